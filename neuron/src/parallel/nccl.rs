//! Ranks on CUDA devices of one host, a device each: what is in their memory is summed and gathered by NCCL.
//!
//! NCCL is opened here and not through cudarc, which looks for it under names that hosts do not have it under and panics
//! where it is missing. Of its interface only what has been the same since 2.17 is used.

// Foreign functions.
#![allow(unsafe_code)]

use super::{Communicator, GroupError, OnDevices, Threads};
use crate::gpu::{Address, CudaDevice, GpuError};
use candle_core::Tensor;
use libloading::Library;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::fmt;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The name that every host has it under.
const LIBRARY: &str = "libnccl.so.2";

// Numbers of nccl.h.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
const MAGIC: c_uint = 0xcafe_beef;
/// Of the interface: 2.17.0.
const VERSION: c_uint = 21_700;
/// What is left to NCCL.
const UNDEFINED: c_int = c_int::MIN;

type Comm = *mut c_void;
type Stream = *mut c_void;

/// What the ranks of one group are told to find each other.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; 128]);

/// `ncclConfig_t` as far as 2.18 has it; the library takes as much as it knows, and later ones are longer.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

type InitRank = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int;
type AllReduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;

/// The functions, as long as the process lives.
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init_rank: InitRank,
    get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    abort: unsafe extern "C" fn(Comm) -> c_int,
    all_reduce: AllReduce,
}

/// Opens NCCL, once.
fn functions() -> Result<&'static Functions, GpuError> {
    static FUNCTIONS: OnceLock<Result<Functions, GpuError>> = OnceLock::new();
    let open = || -> Result<Functions, libloading::Error> {
        // SAFETY: NCCL's initialisers may run at any time, and the functions are of the types in nccl.h. The library is
        // never closed.
        unsafe {
            let library: &'static Library = Box::leak(Box::new(Library::new(LIBRARY)?));
            Ok(Functions {
                get_unique_id: *library.get(b"ncclGetUniqueId\0")?,
                init_rank: *library.get(b"ncclCommInitRankConfig\0")?,
                get_async_error: *library.get(b"ncclCommGetAsyncError\0")?,
                abort: *library.get(b"ncclCommAbort\0")?,
                all_reduce: *library.get(b"ncclAllReduce\0")?,
            })
        }
    };
    let opened = FUNCTIONS.get_or_init(|| {
        open().map_err(|error| GpuError::NoLibrary {
            library: LIBRARY,
            reason: error.to_string(),
        })
    });
    opened.as_ref().map_err(Clone::clone)
}

/// The names of nccl.h.
fn name(code: c_int) -> &'static str {
    match code {
        1 => "ncclUnhandledCudaError",
        2 => "ncclSystemError",
        3 => "ncclInternalError",
        4 => "ncclInvalidArgument",
        5 => "ncclInvalidUsage",
        6 => "ncclRemoteError",
        IN_PROGRESS => "ncclInProgress",
        _ => "unknown to this build",
    }
}

fn failed(rank: usize, call: &'static str, code: c_int) -> GroupError {
    let name = name(code).into();
    GroupError::Failed {
        rank,
        reason: GpuError::Call { call, code, name }.to_string(),
    }
}

/// One rank of a group. What is on the host goes between threads, as without devices; that group's fault is this one's too.
/// When it is dropped, the group is broken.
pub struct Nccl {
    host: Threads,
    device: Arc<CudaDevice>,
    functions: &'static Functions,
    /// None when the group is broken.
    comm: Mutex<Option<Handle>>,
    /// Calls on the device that each rank has made.
    calls: Arc<[AtomicU64]>,
    deadline: Duration,
}

struct Handle(Comm);

// SAFETY: NCCL takes its handles from any thread, one at a time.
unsafe impl Send for Handle {}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl")
            .field("host", &self.host)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Nccl {
    /// The ranks of a new group, one for each device.
    ///
    /// # Errors
    /// When NCCL is missing, fails, or needs longer than `deadline`.
    pub fn group(
        devices: Vec<Arc<CudaDevice>>,
        deadline: Duration,
    ) -> Result<Vec<Self>, GroupError> {
        let failed_at_start = |rank, error: GpuError| GroupError::Failed {
            rank,
            reason: error.to_string(),
        };
        let functions = functions().map_err(|error| failed_at_start(0, error))?;
        let world_size = devices.len();
        let mut id = UniqueId([0; 128]);
        // SAFETY: it is written to a variable that is ours.
        match unsafe { (functions.get_unique_id)(&raw mut id) } {
            SUCCESS => {}
            code => return Err(failed(0, "ncclGetUniqueId", code)),
        }
        let calls: Arc<[AtomicU64]> = (0..world_size).map(|_| AtomicU64::new(0)).collect();
        let hosts = Threads::group(world_size, deadline)?;
        let mut ranks = Vec::with_capacity(world_size);
        for (host, device) in hosts.into_iter().zip(devices) {
            let rank = host.rank();
            device
                .make_current()
                .map_err(|error| failed_at_start(rank, error))?;
            let mut config = Config {
                size: size_of::<Config>(),
                magic: MAGIC,
                version: VERSION,
                // Every call comes back at once and is asked after.
                blocking: 0,
                cga_cluster_size: UNDEFINED,
                min_ctas: UNDEFINED,
                max_ctas: UNDEFINED,
                net_name: null(),
                split_share: UNDEFINED,
            };
            let mut comm = null_mut();
            // SAFETY: the handle is written to a variable that is ours, and the configuration says how long it is. The
            // current context is that of the rank's device.
            let code = unsafe {
                (functions.init_rank)(
                    &raw mut comm,
                    world_size as c_int,
                    id,
                    rank as c_int,
                    &raw mut config,
                )
            };
            if code != SUCCESS && code != IN_PROGRESS {
                return Err(failed(rank, "ncclCommInitRankConfig", code));
            }
            calls[rank].fetch_add(1, Ordering::Relaxed);
            ranks.push(Self {
                host,
                device,
                functions,
                comm: Mutex::new(Some(Handle(comm))),
                calls: calls.clone(),
                deadline,
            });
        }
        // They find each other only when all have been begun.
        for rank in &ranks {
            rank.with(|comm| rank.ask_after(comm, "ncclCommInitRankConfig", IN_PROGRESS))?;
        }
        Ok(ranks)
    }

    /// The sum over all ranks of `count` f32 at `at`, in their place, in the order of the device's work.
    ///
    /// # Errors
    /// When the group is broken.
    pub fn all_reduce_device(&self, at: Address, count: usize) -> Result<(), GroupError> {
        self.call(|comm| {
            let at = at as *mut c_void;
            // SAFETY: handle and stream are alive. That there are so many numbers is up to the caller.
            let code = unsafe {
                let stream = self.device.stream().cast();
                (self.functions.all_reduce)(at, at, count, FLOAT32, SUM, comm, stream)
            };
            self.ask_after(comm, "ncclAllReduce", code)
        })
    }

    /// Waits until the device has done all its work. To be called before anything that waits for the device without end:
    /// work that waits for another rank ends only where that one comes.
    ///
    /// # Errors
    /// When the group is broken, or this has taken longer than its deadline.
    pub fn settle(&self) -> Result<(), GroupError> {
        self.with(|comm| {
            self.wait_for(|| match self.device.is_idle() {
                Ok(true) => Ok(true),
                Ok(false) => match self.state(comm) {
                    SUCCESS | IN_PROGRESS => Ok(false),
                    code => Err(failed(self.host.rank(), "ncclCommGetAsyncError", code)),
                },
                Err(error) => Err(GroupError::Failed {
                    rank: self.host.rank(),
                    reason: error.to_string(),
                }),
            })
        })
    }

    /// Makes a call that all ranks make.
    fn call(&self, make: impl FnOnce(Comm) -> Result<(), GroupError>) -> Result<(), GroupError> {
        self.with(|comm| {
            self.calls[self.host.rank()].fetch_add(1, Ordering::Relaxed);
            self.device
                .make_current()
                .map_err(|error| GroupError::Failed {
                    rank: self.host.rank(),
                    reason: error.to_string(),
                })?;
            make(comm)
        })
    }

    /// Gives the handle to `work`. Where that fails or the group is broken, this rank's part of it is ended.
    fn with(&self, work: impl FnOnce(Comm) -> Result<(), GroupError>) -> Result<(), GroupError> {
        let mut comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = match (self.host.fault(), &*comm) {
            (None, Some(handle)) => work(handle.0),
            (Some(fault), _) => Err(fault),
            (None, None) => Err(GroupError::Ended {
                rank: self.host.rank(),
            }),
        };
        outcome.map_err(|fault| {
            let fault = self.break_up(fault);
            self.end(comm.take());
            fault
        })
    }

    /// Breaks the group; gives what has broken it, which may be an earlier fault.
    fn break_up(&self, fault: GroupError) -> GroupError {
        self.host.abort(fault.clone());
        self.host.fault().unwrap_or(fault)
    }

    /// Ends what this rank's device still does for the group, without the others.
    fn end(&self, comm: Option<Handle>) {
        if let Some(Handle(comm)) = comm {
            let _ = self.device.make_current();
            // SAFETY: the handle is alive, and nobody has it after this.
            let code = unsafe { (self.functions.abort)(comm) };
            if code != SUCCESS {
                tracing::warn!(code, name = name(code), "ncclCommAbort");
            }
        }
    }

    /// What NCCL says of the call before.
    fn state(&self, comm: Comm) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the handle is alive, and the number is written to a variable that is ours.
        match unsafe { (self.functions.get_async_error)(comm, &raw mut state) } {
            SUCCESS => state,
            code => code,
        }
    }

    /// Waits until NCCL has taken a call that it answered with `code`.
    fn ask_after(&self, comm: Comm, call: &'static str, code: c_int) -> Result<(), GroupError> {
        let mut code = code;
        self.wait_for(|| match code {
            SUCCESS => Ok(true),
            IN_PROGRESS => {
                code = self.state(comm);
                Ok(code == SUCCESS)
            }
            code => Err(failed(self.host.rank(), call, code)),
        })
    }

    /// Asks until it is done, the group is broken or the deadline is over.
    fn wait_for(
        &self,
        mut done: impl FnMut() -> Result<bool, GroupError>,
    ) -> Result<(), GroupError> {
        let begun = Instant::now();
        while !done()? {
            if let Some(fault) = self.host.fault() {
                return Err(fault);
            }
            if begun.elapsed() > self.deadline {
                // Whoever has made the fewest calls is who the others wait for.
                let count = |rank: &usize| self.calls[*rank].load(Ordering::Relaxed);
                let rank = (0..self.calls.len()).min_by_key(count).unwrap_or(0);
                let deadline = self.deadline;
                return Err(GroupError::Stalled { rank, deadline });
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        let comm = self.comm.get_mut().unwrap_or_else(PoisonError::into_inner);
        let comm = comm.take();
        self.end(comm);
    }
}

impl Communicator for Nccl {
    joined_by_host!();
}

impl OnDevices for Nccl {
    fn all_reduce(&self, at: Address, count: usize) -> Result<(), GroupError> {
        self.all_reduce_device(at, count)
    }

    fn settle(&self) -> Result<(), GroupError> {
        Nccl::settle(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::driver::tests::{DONE, STAND_IN, floats, make_stand_in, put, run_with};
    use std::thread;

    const PATIENT: Duration = Duration::from_secs(30);

    /// Two devices, where there are so many and NCCL.
    fn devices() -> Option<Vec<Arc<CudaDevice>>> {
        let open = |ordinal| CudaDevice::open(ordinal).map(Arc::new);
        match (open(0), open(1), functions()) {
            (Ok(first), Ok(second), Ok(_)) => Some(vec![first, second]),
            outcome => {
                eprintln!("skipped: {:?} {:?}", outcome.0.err(), outcome.1.err());
                None
            }
        }
    }

    #[test]
    fn ranks_on_devices_are_one() {
        let Some(devices) = devices() else { return };
        let ranks = Nccl::group(devices.clone(), PATIENT).unwrap();
        thread::scope(|scope| {
            for (nccl, device) in ranks.iter().zip(&devices) {
                scope.spawn(move || {
                    let rank = nccl.rank();
                    let own = vec![1.0 + rank as f32; 1000];
                    let at = put(device, &own);
                    for wanted in [3.0, 6.0] {
                        nccl.all_reduce_device(at, own.len()).unwrap();
                        nccl.settle().unwrap();
                        assert_eq!(floats(device, at, own.len()), vec![wanted; own.len()]);
                    }
                });
            }
        });
        drop(ranks);

        // One does not come: all are told who.
        let deadline = Duration::from_millis(200);
        let ranks = Nccl::group(devices.clone(), deadline).unwrap();
        let at = put(&devices[0], &[1.0_f32; 10]);
        let stalled = Err(GroupError::Stalled { rank: 1, deadline });
        // A device that takes work without waiting shows it when it is waited for.
        let outcome = ranks[0]
            .all_reduce_device(at, 10)
            .and_then(|()| ranks[0].settle());
        assert_eq!(outcome, stalled);
        assert_eq!(ranks[1].all_reduce_device(at, 10), stalled);
        assert_eq!(ranks[1].fault(), stalled.err());
        drop(ranks);

        // One ends while another waits.
        let mut ranks = Nccl::group(devices.clone(), PATIENT).unwrap();
        let last = ranks.pop();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                ranks[0].all_reduce_device(at, 10)?;
                ranks[0].settle()
            });
            drop(last);
            assert_eq!(waiting.join().unwrap(), Err(GroupError::Ended { rank: 1 }));
        });
        eprintln!("{DONE}");
    }

    #[test]
    fn ranks_on_stand_ins_are_one() {
        let folder = tempfile::tempdir().unwrap();
        make_stand_in(folder.path(), &STAND_IN);
        let test = "parallel::nccl::tests::ranks_on_devices_are_one";
        let (passed, said) = run_with(folder.path(), test, "13000");
        assert!(passed && said.contains(DONE), "{said}");
    }
}
