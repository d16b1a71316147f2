// Tokens grouped by the expert that was chosen for them. Knows ids and weights only.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "moe.h"

namespace hfa {
namespace moe {

struct Group {
  int64_t expert;
  int64_t first, count;  // of Groups::tokens
};

struct Groups {
  std::vector<Group> groups;    // of the experts chosen at least once, in their order
  std::vector<int64_t> tokens;  // by expert, then by place in expert_ids
  std::vector<float> weights;   // beside tokens

  // False if an id is negative.
  bool fill(const HfaMoeArgs& args) {
    const int64_t pairs = args.num_tokens * args.top_k;
    std::vector<int64_t> starts(args.num_experts + 1, 0);
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t id = args.expert_ids[i];
      if (id < 0) return false;
      if (id < args.num_experts) ++starts[id + 1];
    }
    for (int64_t e = 0; e < args.num_experts; ++e) {
      if (starts[e + 1]) groups.push_back({e, starts[e], starts[e + 1]});
      starts[e + 1] += starts[e];
    }
    tokens.resize(starts[args.num_experts]);
    weights.resize(tokens.size());
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t id = args.expert_ids[i];
      if (id >= args.num_experts) continue;
      const int64_t place = starts[id]++;
      tokens[place] = i / args.top_k;
      weights[place] = args.expert_weights[i];
    }
    return true;
  }
};

}  // namespace moe
}  // namespace hfa
