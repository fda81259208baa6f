//! neuron: holds models on one host and runs them in process.
//!
//! `api` → `engine` → `model` → `kernels`; see ARCHITECTURE.md for what each may know.

pub mod api;
pub mod app;
pub mod bench;
pub mod cli;
pub mod config;
pub mod devices;
pub mod engine;
pub mod gpu;
pub mod join;
pub mod kernels;
pub mod memory;
pub mod model;
pub mod parallel;
pub mod quant;
pub mod residency;
pub mod selftest;
pub mod telemetry;
pub mod text;
pub mod verify;
pub mod weights;
