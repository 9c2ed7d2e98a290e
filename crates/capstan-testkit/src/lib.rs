//! Test support: tiny random models of every architecture, and where the real model lies.
//!
//! For tests only. Functions here may panic when the machine is not set up; libraries never depend on this crate but as
//! a development dependency.
#![forbid(unsafe_code)]

pub mod models;
pub mod tiny;
