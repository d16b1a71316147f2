"""The demo: a small trained model that ships with the package, and the side-by-side run of it."""
