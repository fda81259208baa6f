//! A device that is this CPU: the sources of the kernels, compiled by g++ with `kernels/cuda/emulator.h`.

use super::{Address, Arg, DeviceMemory, Driver, Factor, Gpu, GpuError, Graph, Launch, Product};
use half::bf16;
use libloading::Library;
use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::{env, fs, process};

/// A device of its own, or none where there is no g++: what needs one then says so and leaves it at that.
pub(crate) fn emulated() -> Option<Arc<dyn Driver>> {
    static KERNELS: OnceLock<Option<Mutex<Kernels>>> = OnceLock::new();
    let kernels = KERNELS.get_or_init(|| Some(Mutex::new(Kernels::open(&library()?))));
    match kernels {
        Some(kernels) => Some(Arc::new(Emulated {
            kernels,
            state: Mutex::default(),
        })),
        None => {
            eprintln!("skipped: there is no g++ to make kernels for the CPU with");
            None
        }
    }
}

/// As [`emulated`], with a workspace.
pub(crate) fn emulated_gpu() -> Option<Gpu> {
    emulated().map(|driver| Gpu::new("cuda:0", driver))
}

/// Memory that nobody wrote to: as f32 or bf16 not a number.
const UNWRITTEN: u8 = 0xff;
/// What allocations are aligned to, and bytes behind each that are to stay [`UNWRITTEN`].
const BOUNDARY: usize = 256;
/// Shared memory that a block can have on the devices we make kernels for.
const MOST_SHARED: u32 = 227 << 10;

struct Emulated {
    /// One launch at a time in this process: the emulator has one set of threads.
    kernels: &'static Mutex<Kernels>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Bytes of each, without the boundary behind it.
    allocations: BTreeMap<Address, usize>,
    graphs: Vec<Vec<Work>>,
    recording: Option<Vec<Work>>,
}

/// What can be recorded.
#[derive(Debug, Clone)]
enum Work {
    Launch {
        kernel: &'static str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        args: Vec<Arg>,
    },
    Multiply(Product),
    Copy {
        to: Address,
        from: Address,
        bytes: usize,
    },
    Zero {
        at: Address,
        bytes: usize,
    },
}

// === impl Emulated

impl std::fmt::Debug for Emulated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Emulated")
    }
}

impl Emulated {
    /// A test that failed while it held the lock says so itself; others go on.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kernels(&self) -> MutexGuard<'_, Kernels> {
        self.kernels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the work or does it.
    fn ask(&self, work: Work) -> Result<(), GpuError> {
        if let Work::Launch {
            kernel,
            grid,
            block,
            shared,
            args,
        } = &work
        {
            self.kernels().check(kernel, *grid, *block, *shared, args)?;
        }
        let mut state = self.state();
        match &mut state.recording {
            Some(recording) => recording.push(work),
            None => self.work(&state, &work),
        }
        Ok(())
    }

    fn work(&self, state: &State, work: &Work) {
        match work {
            Work::Launch {
                kernel,
                grid,
                block,
                shared,
                args,
            } => {
                for arg in args {
                    if let Arg::Address(address @ 1..) = arg {
                        state.bytes(*address, 1);
                    }
                }
                self.kernels().launch(kernel, *grid, *block, *shared, args);
            }
            Work::Multiply(product) => state.multiply(product),
            Work::Copy { to, from, bytes } => {
                let source = state.bytes(*from, *bytes).to_vec();
                state.bytes(*to, *bytes).copy_from_slice(&source);
            }
            Work::Zero { at, bytes } => state.bytes(*at, *bytes).fill(0),
        }
    }
}

impl Driver for Emulated {
    fn name(&self) -> String {
        "this CPU".into()
    }

    /// Few, as kernels are launched with so many blocks that all are busy.
    fn processors(&self) -> u32 {
        1
    }

    fn memory(&self) -> Result<DeviceMemory, GpuError> {
        const TOTAL: u64 = 8 << 30;
        let taken: usize = self.state().allocations.values().sum();
        Ok(DeviceMemory {
            total: TOTAL,
            free: TOTAL - taken as u64,
        })
    }

    fn allocate(&self, bytes: usize) -> Result<Address, GpuError> {
        self.state().not_while_recording("allocate")?;
        let layout = layout(bytes);
        // SAFETY: the layout is not empty, and what is allocated is all written.
        #[allow(unsafe_code)]
        let address = unsafe {
            let pointer = std::alloc::alloc(layout);
            if pointer.is_null() {
                return Err(GpuError::OutOfMemory { bytes });
            }
            pointer.write_bytes(UNWRITTEN, layout.size());
            pointer as Address
        };
        self.state().allocations.insert(address, bytes);
        Ok(address)
    }

    fn release(&self, address: Address) {
        let mut state = self.state();
        let bytes = state.allocations.remove(&address);
        free(address, bytes.expect("what is released was allocated"));
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<(), GpuError> {
        let state = self.state();
        state.not_while_recording("upload")?;
        state.bytes(to, bytes.len()).copy_from_slice(bytes);
        Ok(())
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<(), GpuError> {
        let state = self.state();
        state.not_while_recording("download")?;
        bytes.copy_from_slice(state.bytes(from, bytes.len()));
        Ok(())
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), GpuError> {
        self.ask(Work::Copy { to, from, bytes })
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<(), GpuError> {
        self.ask(Work::Zero { at, bytes })
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), GpuError> {
        self.ask(Work::Launch {
            kernel: launch.kernel,
            grid: launch.grid,
            block: launch.block,
            shared: launch.shared,
            args: launch.args.to_vec(),
        })
    }

    fn multiply(&self, product: &Product) -> Result<(), GpuError> {
        self.ask(Work::Multiply(*product))
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        self.state().not_while_recording("synchronize")
    }

    fn begin_recording(&self) -> Result<(), GpuError> {
        let mut state = self.state();
        state.not_while_recording("begin_recording")?;
        state.recording = Some(Vec::new());
        Ok(())
    }

    fn end_recording(&self) -> Result<Graph, GpuError> {
        let mut state = self.state();
        let recorded = state
            .recording
            .take()
            .ok_or_else(|| refused("end_recording", "nothing is recorded"))?;
        state.graphs.push(recorded);
        Ok(Graph(state.graphs.len() - 1))
    }

    fn replay(&self, graph: Graph) -> Result<(), GpuError> {
        let state = self.state();
        state.not_while_recording("replay")?;
        for work in &state.graphs[graph.0] {
            self.work(&state, work);
        }
        Ok(())
    }

    fn forget(&self, graph: Graph) {
        self.state().graphs[graph.0].clear();
    }
}

fn refused(call: &'static str, name: impl Into<String>) -> GpuError {
    const INVALID_VALUE: i32 = 1;
    GpuError::Call {
        call,
        code: INVALID_VALUE,
        name: name.into(),
    }
}

// === impl State

impl State {
    fn not_while_recording(&self, call: &'static str) -> Result<(), GpuError> {
        match self.recording {
            Some(_) => Err(refused(call, "work is being recorded")),
            None => Ok(()),
        }
    }

    /// Bytes of one allocation. Whoever asks for others has a mistake, which is to show.
    #[allow(clippy::mut_from_ref)]
    fn bytes(&self, at: Address, bytes: usize) -> &mut [u8] {
        let within = self.allocations.range(..=at).next_back();
        let within =
            within.is_some_and(|(start, length)| at + bytes as u64 <= start + *length as u64);
        assert!(within, "{bytes} bytes at {at:#x} are in no allocation");
        // SAFETY: they are written, lie in an allocation that lives as long as this, and are read or written by the one
        // call that holds the lock around this, which asks for others only when it is done with these.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(at as *mut u8, bytes)
        }
    }

    fn multiply(&self, product: &Product) {
        let Product {
            factor,
            a,
            b,
            c,
            m,
            n,
            k,
        } = *product;
        let a = self.factors(factor, a, m * k);
        let b = self.factors(factor, b, n * k);
        let sums: Vec<f32> = a
            .chunks_exact(k)
            .flat_map(|a| {
                b.chunks_exact(k)
                    .map(|b| a.iter().zip(b).map(|(a, b)| a * b).sum())
            })
            .collect();
        self.bytes(c, 4 * m * n)
            .copy_from_slice(bytemuck::cast_slice(&sums));
    }

    fn factors(&self, factor: Factor, at: Address, count: usize) -> Vec<f32> {
        match factor {
            Factor::F32 => bytemuck::cast_slice(self.bytes(at, 4 * count)).to_vec(),
            Factor::Bf16 => bytemuck::cast_slice::<_, bf16>(self.bytes(at, 2 * count))
                .iter()
                .map(|x| x.to_f32())
                .collect(),
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        for (address, bytes) in std::mem::take(&mut self.allocations) {
            free(address, bytes);
        }
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes + BOUNDARY, BOUNDARY).expect("tests allocate little")
}

/// Frees what [`Emulated::allocate`] gave, after a look at whether a kernel wrote behind it.
fn free(address: Address, bytes: usize) {
    // SAFETY: it was allocated and written with this layout, and nobody has it any more.
    #[allow(unsafe_code)]
    let intact = unsafe {
        let behind = std::slice::from_raw_parts((address as *const u8).add(bytes), BOUNDARY);
        let intact = behind.iter().all(|byte| *byte == UNWRITTEN);
        std::alloc::dealloc(address as *mut u8, layout(bytes));
        intact
    };
    assert!(
        intact || std::thread::panicking(),
        "a kernel wrote behind an allocation of {bytes} bytes"
    );
}

// === the kernels

struct Kernels {
    launch: LaunchFn,
    parameters: ParametersFn,
}

type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    c_uint,
    c_uint,
    *const *const c_void,
    c_int,
) -> c_int;
type ParametersFn = unsafe extern "C" fn(*const c_char) -> *const c_char;

impl Kernels {
    fn open(library: &Path) -> Self {
        // SAFETY: the library is ours and runs nothing but the listing of its kernels when it is opened; the types are
        // those of `emulator.h`; it is never closed.
        #[allow(unsafe_code)]
        unsafe {
            let library = Library::new(library).expect("what g++ made can be opened");
            let kernels = Self {
                launch: *library.get(b"emulator_launch").expect("the emulator's"),
                parameters: *library.get(b"emulator_parameters").expect("the emulator's"),
            };
            std::mem::forget(library);
            kernels
        }
    }

    /// Holds a launch to the kernel's parameters and to what a device allows.
    fn check(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        args: &[Arg],
    ) -> Result<(), GpuError> {
        let name = CString::new(kernel).expect("a name has no zeros");
        // SAFETY: it takes a string and gives null or a string that stands as long as the library.
        #[allow(unsafe_code)]
        let parameters = unsafe {
            let parameters = (self.parameters)(name.as_ptr());
            if parameters.is_null() {
                return Err(GpuError::NoKernel(kernel.into()));
            }
            CStr::from_ptr(parameters)
        };
        let given: Vec<u8> = args
            .iter()
            .map(|arg| match arg {
                Arg::Address(_) => b'p',
                Arg::Int(_) => b'i',
                Arg::Long(_) => b'l',
                Arg::Float(_) => b'f',
            })
            .collect();
        if given != parameters.to_bytes() {
            return Err(refused(
                "launch",
                format!(
                    "{kernel} takes {parameters:?}, not {}",
                    given.escape_ascii()
                ),
            ));
        }
        let [x, y, z] = grid;
        let fits = (1..1 << 31).contains(&x)
            && (1..1 << 16).contains(&y)
            && (1..1 << 16).contains(&z)
            && (32..=1024).contains(&block)
            && block.is_multiple_of(32)
            && shared <= MOST_SHARED;
        if !fits {
            return Err(refused(
                "launch",
                format!("{kernel}: grid {grid:?}, block {block}, {shared} bytes shared"),
            ));
        }
        Ok(())
    }

    fn launch(&self, kernel: &str, grid: [u32; 3], block: u32, shared: u32, args: &[Arg]) {
        let name = CString::new(kernel).expect("a name has no zeros");
        let pointers: Vec<*const c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Address(value) => std::ptr::from_ref(value).cast(),
                Arg::Int(value) => std::ptr::from_ref(value).cast(),
                Arg::Long(value) => std::ptr::from_ref(value).cast(),
                Arg::Float(value) => std::ptr::from_ref(value).cast(),
            })
            .collect();
        // SAFETY: `check` saw that these are the kernel's parameters; what a kernel does with addresses is what is
        // tested here.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.launch)(
                name.as_ptr(),
                grid.as_ptr(),
                block,
                shared,
                pointers.as_ptr(),
                pointers.len() as c_int,
            )
        };
        assert_eq!(code, 0, "{kernel} was checked before");
    }
}

/// The sources' library, made if this version of them has none yet; none where there is no g++.
fn library() -> Option<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/cuda");
    let mut files: Vec<PathBuf> = fs::read_dir(&sources)
        .expect("the kernels lie there")
        .map(|entry| entry.expect("the folder is read").path())
        .filter(|path| {
            let kind = path.extension().unwrap_or_default();
            kind == "cu" || kind == "cuh" || kind == "h"
        })
        .collect();
    files.sort();
    let mut hasher = DefaultHasher::new();
    FLAGS.hash(&mut hasher);
    for file in &files {
        file.hash(&mut hasher);
        fs::read(file).expect("a source").hash(&mut hasher);
    }
    // `target/PROFILE/deps/neuron-HASH` is what runs
    let target = env::current_exe().expect("this test has a file");
    let target = target
        .ancestors()
        .nth(3)
        .expect("it is in target")
        .join("tmp");
    fs::create_dir_all(&target).expect("the target folder can be written");
    let library = target.join(format!("kernels-{:016x}.so", hasher.finish()));
    if library.exists() {
        return Some(library);
    }
    Command::new("g++").arg("--version").output().ok()?;
    // under names of this process: others may be making the same
    let objects: Vec<(Child, PathBuf)> = files
        .iter()
        .filter(|file| file.extension().unwrap_or_default() == "cu")
        .map(|file| compile(file, &sources, &target))
        .collect();
    let objects: Vec<PathBuf> = objects
        .into_iter()
        .map(|(mut compiler, object)| {
            let status = compiler.wait().expect("g++ ends");
            assert!(status.success(), "{} was not made", object.display());
            object
        })
        .collect();
    let linked = target.join(format!("kernels-{}.so", process::id()));
    let status = Command::new("g++")
        .args(FLAGS)
        .args(["-shared", "-o"])
        .arg(&linked)
        .args(&objects)
        .status();
    assert!(status.expect("g++ was there").success());
    for object in objects {
        for made in [object.with_extension("cpp"), object] {
            fs::remove_file(made).expect("it was just made");
        }
    }
    fs::rename(linked, &library).expect("both are in one folder");
    Some(library)
}

const FLAGS: &[&str] = &["-std=c++20", "-O2", "-w", "-fPIC", "-fvisibility=hidden"];

/// Starts to compile one source. What it defines is its own, as with nvcc: two may have functions of one name.
fn compile(source: &Path, sources: &Path, target: &Path) -> (Child, PathBuf) {
    let name = source.file_stem().expect("it has a name").display();
    let unit = target.join(format!("kernels-{}-{name}.cpp", process::id()));
    let object = unit.with_extension("o");
    let text = format!(
        "#include \"common.cuh\"\nnamespace {{\n#include \"{}\"\n}}\n",
        source.display()
    );
    fs::write(&unit, text).expect("the target folder can be written");
    let compiler = Command::new("g++")
        .args(FLAGS)
        .arg("-I")
        .arg(sources)
        .arg("-c")
        .arg(&unit)
        .arg("-o")
        .arg(&object)
        .spawn();
    (compiler.expect("g++ was there"), object)
}

mod tests {
    use super::*;

    fn put(device: &dyn Driver, values: &[f32]) -> Address {
        let bytes = bytemuck::cast_slice(values);
        let address = device.allocate(bytes.len()).expect("there is room");
        device.upload(address, bytes).expect("it was allocated");
        address
    }

    fn get(device: &dyn Driver, from: Address, count: usize) -> Vec<f32> {
        let mut values = vec![0.0; count];
        device
            .download(from, bytemuck::cast_slice_mut(&mut values))
            .expect("it was allocated");
        values
    }

    fn add<'a>(args: &'a [Arg]) -> Launch<'a> {
        Launch {
            kernel: "add",
            grid: [1, 1, 1],
            block: 32,
            shared: 0,
            args,
        }
    }

    #[test]
    fn recorded_work_is_done_when_it_is_replayed() {
        let Some(device) = emulated() else { return };
        let device = &*device;
        let [sum, x, copied] = [[1.0, 2.0], [10.0, 20.0], [0.0; 2]].map(|two| put(device, &two));
        let args = [Arg::Address(sum), Arg::Address(x), Arg::Long(2)];
        device.begin_recording().expect("nothing is recorded yet");
        device.launch(&add(&args)).expect("it fits");
        device.copy(copied, sum, 8).expect("it fits");
        device.zero(x, 4).expect("it fits");
        assert!(device.upload(x, &[0; 8]).is_err());
        assert!(device.download(x, &mut [0; 8]).is_err());
        assert!(device.begin_recording().is_err());
        let graph = device.end_recording().expect("it was begun");
        assert_eq!(get(device, sum, 2), [1.0, 2.0]);
        device.replay(graph).expect("it was recorded");
        assert_eq!(get(device, copied, 2), [11.0, 22.0]);
        assert_eq!(get(device, x, 2), [0.0, 20.0]);
        device.replay(graph).expect("it was recorded");
        assert_eq!(get(device, copied, 2), [11.0, 42.0]);
        assert!(device.end_recording().is_err());
    }

    #[test]
    fn launches_are_held_to_what_the_kernel_takes() {
        let Some(device) = emulated() else { return };
        let x = put(&*device, &[1.0]);
        let right = [Arg::Address(x), Arg::Address(x), Arg::Long(0)];
        assert_eq!(device.launch(&add(&right)), Ok(()));
        let refused = |launch: Launch<'_>| device.launch(&launch).expect_err("it does not fit");
        refused(add(&right[..2]));
        refused(add(&[right[0], right[1], Arg::Int(0)]));
        let block = 48;
        refused(Launch {
            block,
            ..add(&right)
        });
        let kernel = "ad";
        let unknown = refused(Launch {
            kernel,
            ..add(&right)
        });
        assert_eq!(unknown, GpuError::NoKernel("ad".into()));
    }

    #[test]
    fn products_are_of_f32_or_bf16() {
        let Some(device) = emulated() else { return };
        let device = &*device;
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.5, -1.0]);
        let narrow = |values: &[f32]| {
            let narrow: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
            let bytes = bytemuck::cast_slice(&narrow);
            let address = device.allocate(bytes.len()).expect("there is room");
            device.upload(address, bytes).expect("it was allocated");
            address
        };
        let factors = [
            (Factor::F32, put(device, &a), put(device, &b)),
            (Factor::Bf16, narrow(&a), narrow(&b)),
        ];
        for (factor, a, b) in factors {
            let c = device.allocate(8).expect("there is room");
            let (m, n, k) = (2, 1, 3);
            let product = Product {
                factor,
                a,
                b,
                c,
                m,
                n,
                k,
            };
            device.multiply(&product).expect("all was allocated");
            assert_eq!(get(device, c, 2), [-1.0, 0.5]);
        }
    }

    #[test]
    #[should_panic = "wrote behind"]
    fn a_write_behind_an_allocation_shows() {
        let device = emulated().expect("wrote behind: cannot be tried without g++");
        let device = &*device;
        let [x, y] = [put(device, &[1.0, 2.0]), put(device, &[0.0])];
        let first = put(device, &[0.0]); // the bits of 0
        let args = [x, first, y].map(Arg::Address);
        let args = [&args[..], &[Arg::Int(2)]].concat();
        let kernel = "gather_rows";
        let launch = Launch {
            kernel,
            ..add(&args)
        };
        device.launch(&launch).expect("it takes these");
        device.release(y);
    }
}
