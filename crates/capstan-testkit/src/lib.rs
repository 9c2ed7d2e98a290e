//! Test support: tiny random models of every architecture, where the real model lies, and a server that speaks the
//! hub's protocol.
//!
//! For tests only. Functions here may panic when the machine is not set up; libraries never depend on this crate but as
//! a development dependency.
#![forbid(unsafe_code)]

pub mod hub;
pub mod models;
pub mod tiny;
