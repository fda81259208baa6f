//! The API of `libz-ng-sys`, served by plain zlib: the two crates declare the same items.
#![no_std]
pub use libz_sys::*;
