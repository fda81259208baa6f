//! A real CUDA device.

// Foreign functions, and memory that they reach.
#![allow(unsafe_code)]

use super::library::{self, check, driver};
use super::staging::Staging;
use super::{Address, Arg, DeviceMemory, Driver, Factor, GpuError, Graph, Launch, Product};
use crate::kernels::cuda::MODULES;
use cudarc::cublas::sys as cublas;
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::fmt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What cuBLAS may use for itself: what its makers advise for Hopper. With memory of its own it would ask for some while
/// work is recorded, which a recording does not allow.
const WORKSPACE: usize = 32 << 20;

/// The most parameters that a kernel may have.
const MOST_ARGUMENTS: usize = 48;

/// Bytes of what the compiler in the driver may say of a module that it refuses.
const LOG: usize = 4096;

/// A device of this host, with one stream of work.
///
/// The thread that begins a recording is also the one that ends it. What a recording is made of should have been done
/// once before: cuBLAS may load a kernel when it first needs it.
pub struct CudaDevice {
    // Parts are dropped from the first to the last.
    /// Those that are forgotten leave their place.
    graphs: Mutex<Vec<Option<Recorded>>>,
    blas: Mutex<Blas>,
    staging: Mutex<Staging>,
    taken: Mutex<HashMap<Address, Memory>>,
    kernels: HashMap<String, Kernel>,
    modules: Vec<Module>,
    recording: AtomicBool,
    stream: Stream,
    context: Context,
    ordinal: usize,
    name: String,
    processors: u32,
}

// SAFETY: the driver takes its handles from any thread; cuBLAS, whose handle one thread at a time may use, is behind a lock,
// as is everything that changes.
unsafe impl Send for CudaDevice {}
// SAFETY: as above.
unsafe impl Sync for CudaDevice {}

/// The context that all users of a device in this process share.
struct Context {
    device: sys::CUdevice,
    handle: sys::CUcontext,
}

impl Context {
    fn retain(device: sys::CUdevice) -> Result<Self, GpuError> {
        let mut handle = null_mut();
        // SAFETY: the handle is written to a variable that is ours.
        unsafe { driver!(cuDevicePrimaryCtxRetain(&raw mut handle, device)) }?;
        Ok(Self { device, handle })
    }

    fn make_current(&self) -> Result<(), GpuError> {
        // SAFETY: the context is alive.
        unsafe { driver!(cuCtxSetCurrent(self.handle)) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once, and all that was made in it is gone.
        let _ = unsafe { driver!(cuDevicePrimaryCtxRelease_v2(self.device)) };
    }
}

struct Stream(sys::CUstream);

impl Stream {
    fn new() -> Result<Self, GpuError> {
        let mut stream = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the handle is written to a variable that is ours.
        unsafe { driver!(cuStreamCreate(&raw mut stream, flags)) }?;
        Ok(Self(stream))
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        // SAFETY: the stream is alive.
        unsafe { driver!(cuStreamSynchronize(self.0)) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and nobody has it any more.
        let _ = unsafe { driver!(cuStreamDestroy_v2(self.0)) };
    }
}

/// Memory of the device.
struct Memory(Address);

impl Memory {
    fn new(bytes: usize) -> Result<Self, GpuError> {
        let mut address = 0;
        // SAFETY: the address is written to a variable that is ours.
        match unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) } {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(GpuError::OutOfMemory { bytes }),
            answer => check("cuMemAlloc_v2", answer).map(|()| Self(address)),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it came from the driver and is given back once; its owner has waited for the work that uses it.
        if let Err(error) = unsafe { driver!(cuMemFree_v2(self.0)) } {
            tracing::warn!(%error, "memory of the device is not given back");
        }
    }
}

/// Kernels that were compiled together.
struct Module(sys::CUmodule);

impl Module {
    fn load(name: &str, ptx: &str) -> Result<Self, GpuError> {
        let ptx = CString::new(ptx).map_err(|_| GpuError::NoKernel(name.into()))?;
        let mut module = null_mut();
        let mut log = vec![0_u8; LOG];
        let mut options = [
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        ];
        // The driver wants numbers in the place of pointers.
        let mut values = [log.as_mut_ptr().cast::<c_void>(), LOG as *mut c_void];
        // SAFETY: the text ends with a zero; there are as many values as options, each of its kind, and the log is as long
        // as it is said to be.
        let outcome = unsafe {
            driver!(cuModuleLoadDataEx(
                &raw mut module,
                ptx.as_ptr().cast(),
                options.len() as u32,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            ))
        };
        outcome.inspect_err(|error| {
            let said = log.split(|byte| *byte == 0).next().unwrap_or_default();
            let said = String::from_utf8_lossy(said);
            tracing::error!(module = name, %error, %said, "the driver refuses kernels");
        })?;
        Ok(Self(module))
    }

    fn kernels(&self) -> Result<Vec<(String, Kernel)>, GpuError> {
        let mut count = 0;
        // SAFETY: the module is alive, and the number is written to a variable that is ours.
        unsafe { driver!(cuModuleGetFunctionCount(&raw mut count, self.0)) }?;
        let mut functions = vec![null_mut(); count as usize];
        // SAFETY: there is room for as many as are asked for.
        unsafe {
            driver!(cuModuleEnumerateFunctions(
                functions.as_mut_ptr(),
                count,
                self.0
            ))
        }?;
        functions.into_iter().map(Kernel::describe).collect()
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and the work that runs its kernels was waited for.
        let _ = unsafe { driver!(cuModuleUnload(self.0)) };
    }
}

/// A kernel of a [`Module`].
struct Kernel {
    function: sys::CUfunction,
    /// Bytes of each parameter.
    parameters: Vec<usize>,
    /// Bytes of dynamic shared memory that it may be given as things are.
    shared: AtomicU32,
}

impl Kernel {
    fn describe(function: sys::CUfunction) -> Result<(String, Self), GpuError> {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: the function is one of a module that is alive; the name's place is written to a variable that is ours.
        unsafe { driver!(cuFuncGetName(&raw mut name, function)) }?;
        // SAFETY: the driver gives a text that ends with a zero and lives as long as the function.
        let name = unsafe { CStr::from_ptr(name) }
            .to_string_lossy()
            .into_owned();
        // Now, as a kernel that is loaded at its first run would stop everything then.
        // SAFETY: as above.
        unsafe { driver!(cuFuncLoad(function)) }?;
        let mut shared = 0;
        // SAFETY: as above; the number is written to a variable that is ours.
        unsafe {
            driver!(cuFuncGetAttribute(
                &raw mut shared,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                function,
            ))
        }?;
        let kernel = Self {
            function,
            parameters: parameters(function)?,
            shared: AtomicU32::new(u32::try_from(shared).unwrap_or(0)),
        };
        Ok((name, kernel))
    }

    /// Lets it have `bytes` of dynamic shared memory.
    fn let_share(&self, bytes: u32) -> Result<(), GpuError> {
        if bytes <= self.shared.load(Ordering::Relaxed) {
            return Ok(());
        }
        // SAFETY: the function is one of a module that is alive.
        unsafe {
            driver!(cuFuncSetAttribute(
                self.function,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                i32::try_from(bytes).unwrap_or(i32::MAX),
            ))
        }?;
        self.shared.fetch_max(bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// Bytes of each parameter of a kernel.
fn parameters(function: sys::CUfunction) -> Result<Vec<usize>, GpuError> {
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is one of a module that is alive; the numbers are written to variables that are ours.
        let answer = unsafe {
            sys::cuFuncGetParamInfo(function, sizes.len(), &raw mut offset, &raw mut size)
        };
        // There is no other end: this is said of the first that the kernel does not have.
        if answer == sys::CUresult::CUDA_ERROR_INVALID_VALUE {
            return Ok(sizes);
        }
        check("cuFuncGetParamInfo", answer)?;
        sizes.push(size);
    }
}

/// Bytes of an argument, and where they are.
fn parts(argument: &Arg) -> (usize, *mut c_void) {
    fn of<T>(value: &T) -> (usize, *mut c_void) {
        (size_of::<T>(), std::ptr::from_ref(value).cast_mut().cast())
    }
    match argument {
        Arg::Address(address) => of(address),
        Arg::Int(number) => of(number),
        Arg::Long(number) => of(number),
        Arg::Float(number) => of(number),
    }
}

/// Work that can be done again.
struct Recorded(sys::CUgraphExec);

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: the handle is ours; what still runs of it comes to its end first.
        let _ = unsafe { driver!(cuGraphExecDestroy(self.0)) };
    }
}

/// Work as it was recorded, which serves to make a [`Recorded`] of it.
struct Recording(sys::CUgraph);

impl Drop for Recording {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and what is made of it does not need it.
        let _ = unsafe { driver!(cuGraphDestroy(self.0)) };
    }
}

/// cuBLAS on the stream of a device.
struct Blas {
    handle: cublas::cublasHandle_t,
    /// Outlives the handle.
    _workspace: Memory,
}

/// Calls a function of cuBLAS by its name.
macro_rules! blas {
    ($name:ident($($argument:expr),* $(,)?)) => {
        check(stringify!($name), cublas::$name($($argument),*))
    };
}

impl Blas {
    fn new(stream: sys::CUstream) -> Result<Self, GpuError> {
        library::cublas()?;
        let workspace = Memory::new(WORKSPACE)?;
        let mut handle = null_mut();
        // SAFETY: the handle is written to a variable that is ours.
        unsafe { blas!(cublasCreate_v2(&raw mut handle)) }?;
        let blas = Self {
            handle,
            _workspace: workspace,
        };
        // Sums are never kept in fewer bits than f32, and f32 is not multiplied as TF32.
        let exact = cublas::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle, the stream and the workspace are alive, the last for as long as the handle; it is set after
        // the stream, which would set it back.
        unsafe {
            blas!(cublasSetMathMode(handle, exact))?;
            blas!(cublasSetStream_v2(handle, stream.cast()))?;
            let workspace = blas._workspace.0 as *mut c_void;
            blas!(cublasSetWorkspace_v2(handle, workspace, WORKSPACE))?;
        }
        Ok(blas)
    }

    fn multiply(&self, product: &Product, [m, n, k]: [i32; 3]) -> Result<(), GpuError> {
        let factor = match product.factor {
            Factor::F32 => cublas::cudaDataType_t::CUDA_R_32F,
            Factor::Bf16 => cublas::cudaDataType_t::CUDA_R_16BF,
        };
        let (one, zero) = (1.0_f32, 0.0_f32);
        // cuBLAS counts down columns. What lies row by row is to it the transposed matrix: it makes cᵀ = b · aᵀ, with b
        // turned back and aᵀ as it lies.
        // SAFETY: the handle is alive and the two numbers are f32, as the kind of sums says. That the addresses are memory
        // of those sizes is up to the caller.
        unsafe {
            blas!(cublasGemmEx(
                self.handle,
                cublas::cublasOperation_t::CUBLAS_OP_T,
                cublas::cublasOperation_t::CUBLAS_OP_N,
                n,
                m,
                k,
                (&raw const one).cast(),
                product.b as *const c_void,
                factor,
                k,
                product.a as *const c_void,
                factor,
                k,
                (&raw const zero).cast(),
                product.c as *mut c_void,
                cublas::cudaDataType_t::CUDA_R_32F,
                n,
                cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            ))
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and nobody has it any more.
        let _ = unsafe { blas!(cublasDestroy_v2(self.handle)) };
    }
}

/// A device that is not opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// What it is called.
    pub name: String,
    /// Bytes of its memory.
    pub total: u64,
    /// Bytes of it that nobody has taken, where that can be told without work on the device.
    pub free: Option<u64>,
    /// What NVML calls it.
    pub uuid: String,
}

/// The version of CUDA that the driver speaks, 13000 for 13.0.
///
/// # Errors
/// When there is no driver, or it cannot be used.
pub fn driver_version() -> Result<i32, GpuError> {
    library::start()
}

/// Whether what products need is here too.
///
/// # Errors
/// What is missing.
pub fn check_libraries() -> Result<(), GpuError> {
    library::cublas()
}

/// All devices, in the order of their numbers.
///
/// # Errors
/// When there is no driver, or it cannot be used.
pub fn found() -> Result<Vec<Found>, GpuError> {
    library::start()?;
    let mut count = 0;
    // SAFETY: the driver was started, and the number is written to a variable that is ours.
    unsafe { driver!(cuDeviceGetCount(&raw mut count)) }?;
    let count = usize::try_from(count).unwrap_or(0);
    (0..count)
        .map(|ordinal| describe(device(ordinal)?))
        .collect()
}

fn device(ordinal: usize) -> Result<sys::CUdevice, GpuError> {
    let number = i32::try_from(ordinal).map_err(|_| GpuError::NoDevice(ordinal))?;
    let mut device = 0;
    // SAFETY: the driver was started, and the number is written to a variable that is ours.
    match unsafe { sys::cuDeviceGet(&raw mut device, number) } {
        sys::CUresult::CUDA_ERROR_INVALID_DEVICE | sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            Err(GpuError::NoDevice(ordinal))
        }
        answer => check("cuDeviceGet", answer).map(|()| device),
    }
}

fn name(device: sys::CUdevice) -> Result<String, GpuError> {
    let mut name: [c_char; 256] = [0; 256];
    // SAFETY: the text is as long as it is said to be, and the driver ends it with a zero.
    let name = unsafe {
        driver!(cuDeviceGetName(
            name.as_mut_ptr(),
            name.len() as i32 - 1,
            device
        ))?;
        CStr::from_ptr(name.as_ptr())
    };
    Ok(name.to_string_lossy().into_owned())
}

fn describe(device: sys::CUdevice) -> Result<Found, GpuError> {
    let mut total = 0;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    let (mut flags, mut active) = (0, 0);
    // SAFETY: the device is there, and what is asked for is written to variables that are ours.
    unsafe {
        driver!(cuDeviceTotalMem_v2(&raw mut total, device))?;
        driver!(cuDeviceGetUuid_v2(&raw mut uuid, device))?;
        driver!(cuDevicePrimaryCtxGetState(
            device,
            &raw mut flags,
            &raw mut active
        ))?;
    }
    // Its free memory is known to a context alone, and one is not made for this: it would take memory itself.
    let free = (active != 0).then(|| {
        let context = Context::retain(device)?;
        context.make_current()?;
        memory().map(|memory| memory.free)
    });
    Ok(Found {
        name: name(device)?,
        total: total as u64,
        free: free.and_then(Result::ok), // a device that has failed is one all the same
        uuid: spell(&uuid.bytes.map(|byte| byte as u8)),
    })
}

/// An identifier as NVIDIA's tools spell it.
fn spell(uuid: &[u8; 16]) -> String {
    let mut text = String::from("GPU-");
    for (at, byte) in uuid.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The memory of the current context's device.
fn memory() -> Result<DeviceMemory, GpuError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the numbers are written to variables that are ours.
    unsafe { driver!(cuMemGetInfo_v2(&raw mut free, &raw mut total)) }?;
    Ok(DeviceMemory {
        total: total as u64,
        free: free as u64,
    })
}

impl CudaDevice {
    /// Opens device `ordinal` and loads all kernels there.
    ///
    /// # Errors
    /// When the host has no driver or no cuBLAS, there is no such device, or it refuses something.
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        Self::with_kernels(ordinal, MODULES)
    }

    fn with_kernels(ordinal: usize, sources: &[(&str, &str)]) -> Result<Self, GpuError> {
        library::start()?;
        library::cublas()?;
        let device = device(ordinal)?;
        let context = Context::retain(device)?;
        context.make_current()?;
        let mut processors = 0;
        // SAFETY: the device is there, and the number is written to a variable that is ours.
        unsafe {
            driver!(cuDeviceGetAttribute(
                &raw mut processors,
                sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                device,
            ))
        }?;
        let stream = Stream::new()?;
        let mut modules = Vec::new();
        let mut kernels = HashMap::new();
        for (name, ptx) in sources {
            let module = Module::load(name, ptx)?;
            kernels.extend(module.kernels()?);
            modules.push(module);
        }
        let staging = Staging::new(stream.0)?;
        let blas = Blas::new(stream.0)?;
        Ok(Self {
            graphs: Mutex::default(),
            blas: Mutex::new(blas),
            staging: Mutex::new(staging),
            taken: Mutex::default(),
            kernels,
            modules,
            recording: AtomicBool::new(false),
            stream,
            context,
            ordinal,
            name: name(device)?,
            processors: u32::try_from(processors).unwrap_or(0),
        })
    }

    /// Its number.
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The stream that all its work is in, for libraries that add to it.
    #[cfg(feature = "nccl")]
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream.0
    }

    /// Whether all work is done.
    ///
    /// # Errors
    /// That of the work.
    #[cfg(feature = "nccl")]
    pub(crate) fn is_idle(&self) -> Result<bool, GpuError> {
        self.make_current()?;
        // SAFETY: the stream is alive.
        match unsafe { sys::cuStreamQuery(self.stream.0) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            answer => check("cuStreamQuery", answer).map(|()| true),
        }
    }

    /// Makes its context the one of this thread, as whatever reaches the device needs.
    pub(crate) fn make_current(&self) -> Result<(), GpuError> {
        self.context.make_current()
    }

    /// Copies between host and device belong to one moment and cannot be recorded; the driver would record them, to be
    /// done with whatever the host's buffer holds then.
    fn refuse_in_recording(&self, call: &'static str) -> Result<(), GpuError> {
        if self.recording.load(Ordering::Relaxed) {
            return check(call, sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice")
            .field("ordinal", &self.ordinal)
            .field("name", &self.name)
            .field("modules", &self.modules.len())
            .field("kernels", &self.kernels.len())
            .finish_non_exhaustive()
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // The parts go next, and all work must be done by then. An error here was given to a call before, or concerns
        // nobody any more.
        let _ = self.make_current();
        let _ = self.stream.synchronize();
    }
}

impl Driver for CudaDevice {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn processors(&self) -> u32 {
        self.processors
    }

    fn memory(&self) -> Result<DeviceMemory, GpuError> {
        self.make_current()?;
        memory()
    }

    fn allocate(&self, bytes: usize) -> Result<Address, GpuError> {
        self.make_current()?;
        let memory = Memory::new(bytes)?;
        let address = memory.0;
        lock(&self.taken).insert(address, memory);
        Ok(address)
    }

    fn release(&self, address: Address) {
        let Some(memory) = lock(&self.taken).remove(&address) else {
            tracing::error!(address, "memory is given back that was not taken");
            return;
        };
        // After a fault nothing can be waited for, and nothing runs any more.
        let _ = self.make_current();
        let _ = self.stream.synchronize();
        drop(memory);
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), GpuError> {
        self.refuse_in_recording("cuMemcpyHtoDAsync_v2")?;
        self.make_current()?;
        lock(&self.staging).upload(to, bytes)
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.refuse_in_recording("cuMemcpyDtoHAsync_v2")?;
        self.make_current()?;
        lock(&self.staging).download(from, bytes)?;
        self.stream.synchronize()
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), GpuError> {
        if bytes == 0 {
            return Ok(());
        }
        self.make_current()?;
        // SAFETY: the stream is alive. That the addresses are memory of that length is up to the caller.
        unsafe { driver!(cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream.0)) }
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<(), GpuError> {
        if bytes == 0 {
            return Ok(());
        }
        self.make_current()?;
        // SAFETY: as for a copy.
        unsafe { driver!(cuMemsetD8Async(at, 0, bytes, self.stream.0)) }
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), GpuError> {
        let Some(kernel) = self.kernels.get(launch.kernel) else {
            return Err(GpuError::NoKernel(launch.kernel.into()));
        };
        let mut places = [null_mut::<c_void>(); MOST_ARGUMENTS];
        let same = launch.args.len() == kernel.parameters.len()
            && launch.args.len() <= places.len()
            && launch
                .args
                .iter()
                .zip(&kernel.parameters)
                .zip(&mut places)
                .all(|((argument, parameter), place)| {
                    let (size, at) = parts(argument);
                    *place = at;
                    size == *parameter
                });
        if !same {
            return Err(GpuError::Arguments(launch.kernel.into()));
        }
        self.make_current()?;
        kernel.let_share(launch.shared)?;
        let [x, y, z] = launch.grid;
        // SAFETY: function and stream are alive, and there is a value for each parameter, of its size. What the kernel does
        // with the addresses is up to the caller.
        unsafe {
            driver!(cuLaunchKernel(
                kernel.function,
                x,
                y,
                z,
                launch.block,
                1,
                1,
                launch.shared,
                self.stream.0,
                places.as_mut_ptr(),
                null_mut(),
            ))
        }
    }

    fn multiply(&self, product: &Product) -> Result<(), GpuError> {
        let size = |what, found| {
            i32::try_from(found).map_err(|_| GpuError::Size {
                what,
                found,
                made_for: "less than 2^31",
            })
        };
        let m = size("a product's rows", product.m)?;
        let n = size("a product's columns", product.n)?;
        let k = size("a product's width", product.k)?;
        if k == 0 {
            return self.zero(product.c, product.m * product.n * size_of::<f32>());
        }
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.make_current()?;
        lock(&self.blas).multiply(product, [m, n, k])
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        self.make_current()?;
        self.stream.synchronize()
    }

    fn begin_recording(&self) -> Result<(), GpuError> {
        self.make_current()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        unsafe { driver!(cuStreamBeginCapture_v2(self.stream.0, mode)) }?;
        self.recording.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn end_recording(&self) -> Result<Graph, GpuError> {
        self.make_current()?;
        let mut graph = null_mut();
        // SAFETY: the stream is alive, and the handle is written to a variable that is ours.
        let outcome = unsafe { driver!(cuStreamEndCapture(self.stream.0, &raw mut graph)) };
        self.recording.store(false, Ordering::Relaxed);
        outcome?;
        let recording = Recording(graph);
        let mut exec = null_mut();
        // SAFETY: as above.
        unsafe { driver!(cuGraphInstantiateWithFlags(&raw mut exec, recording.0, 0)) }?;
        let mut graphs = lock(&self.graphs);
        graphs.push(Some(Recorded(exec)));
        Ok(Graph(graphs.len() - 1))
    }

    fn replay(&self, graph: Graph) -> Result<(), GpuError> {
        self.make_current()?;
        let graphs = lock(&self.graphs);
        let Some(Some(recorded)) = graphs.get(graph.0) else {
            return check("cuGraphLaunch", sys::CUresult::CUDA_ERROR_INVALID_HANDLE);
        };
        // SAFETY: graph and stream are alive.
        unsafe { driver!(cuGraphLaunch(recorded.0, self.stream.0)) }
    }

    fn forget(&self, graph: Graph) {
        let recorded = lock(&self.graphs).get_mut(graph.0).and_then(Option::take);
        // The driver lets a graph that still runs come to its end.
        let _ = self.make_current();
        drop(recorded);
    }
}

#[cfg(test)]
pub(crate) mod tests;
