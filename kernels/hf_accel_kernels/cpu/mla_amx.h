// Latent attention in bf16 on the AMX tile unit.
#pragma once
#include "mla_vector.h"

namespace {
namespace mla {

template <class K, class T>
static void attend_block(const HfaMlaArgs& a, const Block& b, const Sizes& s, const State& state, Buffers<K>& buf) {
  attend_vectors<K, T>(a, b, s, state, buf);
}

}  // namespace mla
}  // namespace
