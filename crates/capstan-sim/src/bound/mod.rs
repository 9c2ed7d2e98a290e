//! The best that a pipeline could do, from its true costs: what the scheduler is measured against.
//!
//! Each bound is optimistic where it simplifies, so a scheduler cannot beat it but by what the definitions in
//! docs/simulation.md leave out.
pub mod beside;
pub mod decode;
pub mod lone;
pub mod prefill;
