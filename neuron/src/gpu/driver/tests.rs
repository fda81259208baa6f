//! The driver on what there is: a real device, or the one of `stand_in.c`.

use super::*;
use std::path::Path;
use std::process::Command;

/// `to[i] += factor * from[i]` for the first `count`: `(to, from, factor, count)`.
const ADD_SCALED: &[(&str, &str)] = &[("add_scaled", include_str!("add_scaled.ptx"))];

/// The libraries that `stand_in.c` makes.
pub(crate) const STAND_IN: [&str; 4] = [
    "libcuda.so.1",
    "libcublasLt.so.13",
    "libcublas.so.13",
    "libnccl.so.2",
];

/// Said where the work on a device was done and not passed over.
pub(crate) const DONE: &str = "all work on a device was done";

pub(crate) fn driver_is_here() -> bool {
    // SAFETY: NVIDIA's driver may be opened at any time.
    unsafe { libloading::Library::new("libcuda.so.1") }.is_ok()
}

pub(crate) fn floats(device: &CudaDevice, at: Address, count: usize) -> Vec<f32> {
    let mut bytes = vec![0; count * size_of::<f32>()];
    device.download(at, &mut bytes).unwrap();
    bytemuck::pod_collect_to_vec(&bytes)
}

pub(crate) fn put<T: bytemuck::NoUninit>(device: &CudaDevice, values: &[T]) -> Address {
    let bytes = bytemuck::cast_slice(values);
    let address = device.allocate(bytes.len()).unwrap();
    device.upload(address, bytes).unwrap();
    address
}

#[test]
fn a_host_without_a_driver_says_so() {
    match CudaDevice::open(0) {
        Err(GpuError::NoLibrary { library, .. }) if library == "libcuda.so.1" => {
            assert!(!driver_is_here());
        }
        _ => assert!(driver_is_here()),
    }
}

#[test]
fn identifiers_are_spelled_as_nvml_spells_them() {
    let bytes = std::array::from_fn(|at| at as u8 * 17);
    assert_eq!(spell(&bytes), "GPU-00112233-4455-6677-8899-aabbccddeeff");
}

#[test]
fn a_device_does_what_it_is_asked_to() {
    if !driver_is_here() {
        eprintln!("skipped: no CUDA driver");
        return;
    }
    let device = CudaDevice::with_kernels(0, ADD_SCALED).unwrap();
    assert!(!device.name().is_empty() && device.processors() > 0);
    let memory = device.memory().unwrap();
    assert!(memory.free > 0 && memory.free <= memory.total);
    let all = found().unwrap();
    assert_eq!(all[0].name, device.name());
    assert!(all[0].free.is_some_and(|free| free > 0), "it is in use");
    copies(&device);
    products(&device);
    kernels(&device);
    recordings(&device);
    errors(&device);
    eprintln!("{DONE}");
}

/// Bytes go up and down whole, however many there are, and may change while they are on their way.
fn copies(device: &CudaDevice) {
    let length = 70 << 20;
    let wanted: Vec<u8> = (0..length)
        .map(|at: usize| (at * 7 + at / 251) as u8)
        .collect();
    let address = device.allocate(length).unwrap();
    assert_eq!(address % 256, 0);
    for part in [length, 13_000, 5 << 20] {
        device.zero(address, length).unwrap();
        let mut source = Vec::new();
        let mut to = address;
        for bytes in wanted.chunks(part) {
            source.clear();
            source.extend_from_slice(bytes);
            device.upload(to, &source).unwrap();
            source.fill(0xee);
            to += bytes.len() as u64;
        }
        let mut got = vec![0xdd; length];
        device.download(address, &mut got).unwrap();
        assert!(got == wanted, "in parts of {part}");
    }
    let other = device.allocate(1000).unwrap();
    device.zero(other, 1000).unwrap();
    device.copy(other + 1, address + 5, 998).unwrap();
    let mut got = [0xdd; 1000];
    // From another thread, which has no context of its own.
    std::thread::scope(|scope| {
        scope
            .spawn(|| device.download(other, &mut got).unwrap())
            .join()
            .unwrap();
    });
    assert_eq!((got[0], got[999]), (0, 0));
    assert_eq!(got[1..999], wanted[5..1003]);
    device.upload(address, &[]).unwrap();
    device.download(address, &mut []).unwrap();
    device.zero(address, 0).unwrap();
    device.release(address);
    device.release(other);
}

/// Small whole numbers, which every order of sums gives exactly.
fn products(device: &CudaDevice) {
    for (m, n, k) in [(1, 8, 4), (5, 7, 3), (33, 20, 64)] {
        let a: Vec<f32> = (0..m * k).map(|at| (at % 11) as f32 - 4.0).collect();
        let b: Vec<f32> = (0..n * k).map(|at| (at % 7) as f32 - 2.0).collect();
        let wanted: Vec<f32> = (0..m * n)
            .map(|at| (0..k).map(|i| a[at / n * k + i] * b[at % n * k + i]).sum())
            .collect();
        let bf16 = |values: &[f32]| -> Vec<u16> {
            values
                .iter()
                .map(|value| half::bf16::from_f32(*value).to_bits())
                .collect()
        };
        let factors = [
            (Factor::F32, put(device, &a), put(device, &b)),
            (Factor::Bf16, put(device, &bf16(&a)), put(device, &bf16(&b))),
        ];
        for (factor, a, b) in factors {
            let c = device.allocate(m * n * size_of::<f32>()).unwrap();
            let product = Product {
                factor,
                a,
                b,
                c,
                m,
                n,
                k,
            };
            device.multiply(&product).unwrap();
            assert_eq!(floats(device, c, m * n), wanted, "{product:?}");
            device.multiply(&Product { k: 0, ..product }).unwrap();
            assert_eq!(floats(device, c, m * n), vec![0.0; m * n]);
            device.multiply(&Product { m: 0, ..product }).unwrap();
        }
    }
    // 1 + 2^-12 is not a TF32 number.
    let fine = 1.0 + 2.0_f32.powi(-12);
    let (a, b) = (put(device, &[fine; 64]), put(device, &[1.0_f32; 64]));
    let c = device.allocate(64).unwrap();
    let product = Product {
        factor: Factor::F32,
        a,
        b,
        c,
        m: 4,
        n: 4,
        k: 16,
    };
    device.multiply(&product).unwrap();
    assert_eq!(floats(device, c, 16), [fine * 16.0; 16]);
    let wide = Product {
        m: 1 << 31,
        ..product
    };
    assert!(matches!(device.multiply(&wide), Err(GpuError::Size { .. })));
}

fn add(device: &CudaDevice, to: Address, from: Address, shared: u32) -> Result<(), GpuError> {
    let args = [
        Arg::Address(to),
        Arg::Address(from),
        Arg::Float(2.0),
        Arg::Int(100),
    ];
    device.launch(&Launch {
        kernel: "add_scaled",
        grid: [2, 1, 1],
        block: 64,
        shared,
        args: &args,
    })
}

fn kernels(device: &CudaDevice) {
    let from = put(device, &[1.5_f32; 128]);
    let to = put(device, &[1.0_f32; 128]);
    // The second is more than a kernel has without asking for it.
    for (shared, wanted) in [(0, 4.0), (64 << 10, 7.0)] {
        add(device, to, from, shared).unwrap();
        let got = floats(device, to, 128);
        assert_eq!(
            (&got[..100], &got[100..]),
            (&[wanted; 100][..], &[1.0; 28][..])
        );
    }
    let launch = |kernel, args: &[Arg]| {
        device.launch(&Launch {
            kernel,
            grid: [1, 1, 1],
            block: 32,
            shared: 0,
            args,
        })
    };
    let unknown = launch("no_such_kernel", &[]);
    assert_eq!(unknown, Err(GpuError::NoKernel("no_such_kernel".into())));
    let refused = Err(GpuError::Arguments("add_scaled".into()));
    let (at, float, int) = (Arg::Address(to), Arg::Float(1.0), Arg::Int(1));
    for args in [
        &[at, at, float][..],
        &[at, at, float, int, int],
        &[at, float, float, int],
    ] {
        assert_eq!(launch("add_scaled", args), refused);
    }
}

fn recordings(device: &CudaDevice) {
    let from = put(device, &[1.0_f32; 128]);
    let to = put(device, &[0.0_f32; 128]);
    let saved = put(device, &[0.0_f32; 128]);
    let c = put(device, &[0.0_f32; 1]);
    let product = Product {
        factor: Factor::F32,
        a: to,
        b: from,
        c,
        m: 1,
        n: 1,
        k: 100,
    };
    let work = || {
        add(device, to, from, 0).unwrap();
        device.copy(saved, to, 512).unwrap();
        device.multiply(&product).unwrap();
    };
    work();
    device.zero(to, 512).unwrap();
    device.zero(c, 4).unwrap();
    device.synchronize().unwrap();

    device.begin_recording().unwrap();
    work();
    let refused = |outcome| match outcome {
        Err(GpuError::Call { code, name, .. }) => {
            assert_eq!(
                (code, &*name),
                (900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
            );
        }
        other => panic!("{other:?}"),
    };
    refused(device.upload(from, &[0; 4]));
    refused(device.download(from, &mut [0; 4]));
    let graph = device.end_recording().unwrap();
    assert_eq!(floats(device, c, 1), [0.0], "nothing was done");

    for (value, sum, products) in [(1.0, 2.0, 200.0), (3.0, 8.0, 2400.0)] {
        device
            .upload(from, bytemuck::cast_slice(&[value; 128]))
            .unwrap();
        device.replay(graph).unwrap();
        assert_eq!(floats(device, saved, 100), [sum; 100]);
        assert_eq!(floats(device, c, 1), [products]);
    }
    let unknown = device.replay(Graph(7)).unwrap_err();
    assert!(
        matches!(unknown, GpuError::Call { code: 400, .. }),
        "{unknown}"
    );
}

fn errors(device: &CudaDevice) {
    let bytes = 1 << 50;
    assert_eq!(device.allocate(bytes), Err(GpuError::OutOfMemory { bytes }));
    let empty = device.allocate(0).unwrap();
    device.release(empty);
    // What is not taken is not given back to the driver.
    device.release(empty);
    assert_eq!(CudaDevice::open(99).unwrap_err(), GpuError::NoDevice(99));
}

/// Makes the libraries of `stand_in.c` in `folder`.
pub(crate) fn make_stand_in(folder: &Path, libraries: &[&str]) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gpu/driver/stand_in.c");
    for library in libraries {
        let made = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wl,-soname"])
            .arg(format!("-Wl,{library}"))
            .arg("-o")
            .arg(folder.join(library))
            .arg(&source)
            .status()
            .unwrap();
        assert!(made.success());
    }
}

/// Runs another test with the libraries in `folder`; gives whether it passed and what it said.
pub(crate) fn run_with(folder: &Path, test: &str, version: &str) -> (bool, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "--include-ignored"])
        .arg(test)
        .env("LD_LIBRARY_PATH", folder)
        .env("STAND_IN_VERSION", version)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said)
}

#[test]
fn a_stand_in_does_what_it_is_asked_to() {
    let folder = tempfile::tempdir().unwrap();
    make_stand_in(
        folder.path(),
        &["libcuda.so.1", "libcublasLt.so.13", "libcublas.so.13"],
    );
    let (passed, said) = run_with(
        folder.path(),
        "gpu::driver::tests::a_device_does_what_it_is_asked_to",
        "13000",
    );
    assert!(passed && said.contains(DONE), "{said}");
}

#[test]
#[ignore = "is run by another test, with libraries of its own"]
fn opening_fails() {
    eprintln!("{:?}", CudaDevice::open(0).unwrap_err());
}

#[test]
fn what_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    make_stand_in(folder.path(), &["libcuda.so.1"]);
    let (passed, said) = run_with(folder.path(), "gpu::driver::tests::opening_fails", "12040");
    let wanted = "OldDriver { found: 12040, needed: 13000 }";
    assert!(passed && said.contains(wanted), "{said}");
    let (passed, said) = run_with(folder.path(), "gpu::driver::tests::opening_fails", "13000");
    // Not where cuBLAS is installed for the whole host.
    let wanted = "NoLibrary { library: \"libcublasLt.so.13\"";
    let installed = Path::new("/usr/local/cuda").exists();
    assert!(installed || (passed && said.contains(wanted)), "{said}");
}
