//! Nothing but tests: see `tests/look.rs`.
