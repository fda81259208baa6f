//! CUDA's libraries, which are opened when neuron runs and need not be there.
//!
//! cudarc panics where a library or a function of it is missing. So each library is opened here first, by the name that
//! hosts have it under, and the driver is asked for its version: one that is new enough has every function used here.

// Foreign functions.
#![allow(unsafe_code)]

use super::GpuError;
use cudarc::driver::sys;
use libloading::Library;
use std::fmt::Debug;
use std::sync::OnceLock;

/// The version that the kernels' PTX and the bindings are of, as the driver counts: 13.0.
const NEEDED: i32 = 13_000;

/// Where the toolkit is installed, for hosts whose linker does not look there.
const FOLDERS: [&str; 2] = ["/usr/local/cuda/lib64", "/usr/local/cuda-13/lib64"];

/// What a call of the driver or a library answers.
pub(super) trait Answer: Copy + Debug {
    /// As the headers number it; 0 is success.
    fn code(self) -> i32;
}

impl Answer for sys::CUresult {
    fn code(self) -> i32 {
        self as i32
    }
}

impl Answer for cudarc::cublas::sys::cublasStatus_t {
    fn code(self) -> i32 {
        self as i32
    }
}

/// Makes an error of an answer that is not success.
pub(super) fn check(call: &'static str, answer: impl Answer) -> Result<(), GpuError> {
    match answer.code() {
        0 => Ok(()),
        code => Err(GpuError::Call {
            call,
            code,
            name: format!("{answer:?}"),
        }),
    }
}

/// Calls a function of the driver by its name.
macro_rules! driver {
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::gpu::library::check(stringify!($name), cudarc::driver::sys::$name($($argument),*))
    };
}
pub(super) use driver;

/// Opens `library` for the life of the process, here or in one of `folders`.
fn open(library: &'static str, folders: &[&str]) -> Result<(), GpuError> {
    // SAFETY: these are NVIDIA's own libraries, whose initialisers may run at any time.
    let by_name = unsafe { Library::new(library) };
    let opened = by_name.or_else(|error| {
        folders
            .iter()
            .find_map(|folder| {
                // SAFETY: as above.
                unsafe { Library::new(format!("{folder}/{library}")) }.ok()
            })
            .ok_or(error)
    });
    match opened {
        Ok(opened) => {
            // Whoever asks for it by its name from now on gets this one.
            std::mem::forget(opened);
            Ok(())
        }
        Err(error) => Err(GpuError::NoLibrary {
            library,
            reason: error.to_string(),
        }),
    }
}

/// Starts the driver, once. Gives the version that it speaks, 13000 for 13.0.
///
/// # Errors
/// When there is none, it is too old, or it cannot start.
pub(super) fn start() -> Result<i32, GpuError> {
    static DRIVER: OnceLock<Result<i32, GpuError>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            open("libcuda.so.1", &[])?;
            let mut version = 0;
            // SAFETY: the version is written to a number that is ours.
            unsafe { driver!(cuDriverGetVersion(&raw mut version)) }?;
            if version < NEEDED {
                return Err(GpuError::OldDriver {
                    found: version,
                    needed: NEEDED,
                });
            }
            // SAFETY: it may be called at any time.
            unsafe { driver!(cuInit(0)) }?;
            Ok(version)
        })
        .clone()
}

/// Opens cuBLAS, once.
///
/// # Errors
/// When it is not there.
pub(super) fn cublas() -> Result<(), GpuError> {
    static CUBLAS: OnceLock<Result<(), GpuError>> = OnceLock::new();
    CUBLAS
        .get_or_init(|| {
            // cuBLAS asks for this one by name, which finds it where it has been opened by its path.
            open("libcublasLt.so.13", &FOLDERS)?;
            open("libcublas.so.13", &FOLDERS)
        })
        .clone()
}
