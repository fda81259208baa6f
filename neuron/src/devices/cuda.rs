//! CUDA devices: what the driver says of them, and what NVML says of their use.

use crate::gpu::GpuError;
use crate::gpu::driver::{self, Found};
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::error::NvmlError;
use protocol::node::{CudaFault, CudaFaultKind, CudaInfo, CudaUse, DeviceInfo};
use std::sync::OnceLock;

/// Devices that models can be put on: none where anything that they need is missing.
pub(super) fn inventory() -> Vec<DeviceInfo> {
    if driver::check_libraries().is_err() {
        return Vec::new();
    }
    let here = driver::found().unwrap_or_default();
    let describe = |(at, found): (usize, Found)| {
        let used = watch(&found.uuid).ok().and_then(|now| now.used_bytes);
        // NVML sees the processes of others too, and needs no work on the device.
        let free = used.map_or(found.free, |used| Some(found.total.saturating_sub(used)));
        DeviceInfo {
            id: id(at),
            name: found.name,
            total_bytes: found.total,
            free_bytes: free.unwrap_or(found.total),
            many_ranks: false,
        }
    };
    here.into_iter().enumerate().map(describe).collect()
}

/// What there is, how it is used now, and what is amiss.
pub(super) fn info() -> CudaInfo {
    let version = driver::driver_version();
    let found = driver::found();
    let mut faults = Vec::new();
    // Without a driver the rest is missing as well, and says nothing new.
    match (&version, &found) {
        (Err(error), _) | (Ok(_), Err(error)) => faults.push(fault(error)),
        (Ok(_), Ok(found)) => {
            if found.is_empty() {
                faults.push(fault(&GpuError::NoDevice(0)));
            }
            faults.extend(driver::check_libraries().err().as_ref().map(fault));
        }
    }
    let found = found.unwrap_or_default();
    let devices = found
        .iter()
        .enumerate()
        .map(|(at, found)| {
            let mut now = watch(&found.uuid).unwrap_or_default();
            now.id = id(at);
            now
        })
        .collect();
    let driver = match nvml() {
        Ok(nvml) => nvml.sys_driver_version().ok(),
        Err(fault) => {
            let mismatch = fault.kind == CudaFaultKind::DriverMismatch;
            if !found.is_empty() || mismatch {
                faults.push(fault.clone());
            }
            None
        }
    };
    CudaInfo {
        version: version.ok().map(spell),
        driver,
        devices,
        faults,
    }
}

fn id(at: usize) -> String {
    format!("cuda:{at}")
}

/// 13000 is 13.0.
fn spell(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// How a device is used now; what it does not tell is left out.
fn watch(uuid: &str) -> Result<CudaUse, NvmlError> {
    let Ok(nvml) = nvml() else {
        return Ok(CudaUse::default());
    };
    let device = nvml.device_by_uuid(uuid)?;
    Ok(CudaUse {
        id: String::new(),
        utilization_percent: device.utilization_rates().ok().map(|rates| rates.gpu),
        temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok(),
        used_bytes: device
            .memory_info()
            .ok()
            .map(|memory| memory.total.saturating_sub(memory.free)),
        processes: device.running_compute_processes_count().ok(),
    })
}

/// NVML, which is opened once.
fn nvml() -> Result<&'static Nvml, &'static CudaFault> {
    static NVML: OnceLock<Result<Nvml, CudaFault>> = OnceLock::new();
    NVML.get_or_init(|| Nvml::init().map_err(|error| nvml_fault(&error)))
        .as_ref()
}

fn fault(error: &GpuError) -> CudaFault {
    let kind = match error {
        GpuError::NoLibrary { library, .. } if library.starts_with("libcuda.") => {
            CudaFaultKind::NoDriver
        }
        GpuError::NoLibrary { .. } => CudaFaultKind::NoLibrary,
        GpuError::OldDriver { .. } => CudaFaultKind::OldDriver,
        GpuError::NoDevice(_) => CudaFaultKind::NoDevice,
        // As cuda.h numbers them: no device; the driver's parts are of several versions, or the library is of one that
        // the hardware is not served by.
        GpuError::Call { code: 100, .. } => CudaFaultKind::NoDevice,
        GpuError::Call {
            code: 803 | 804, ..
        } => CudaFaultKind::DriverMismatch,
        _ => CudaFaultKind::Refused,
    };
    CudaFault {
        kind,
        reason: error.to_string(),
    }
}

fn nvml_fault(error: &NvmlError) -> CudaFault {
    let kind = match error {
        NvmlError::LibRmVersionMismatch => CudaFaultKind::DriverMismatch,
        _ => CudaFaultKind::NoMonitoring,
    };
    CudaFault {
        kind,
        reason: format!("NVML: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::driver::tests::{STAND_IN, driver_is_here, make_stand_in, run_with};

    #[test]
    fn faults_are_told_apart_by_their_kind() {
        let missing = |library| GpuError::NoLibrary {
            library,
            reason: String::new(),
        };
        let call = |code| GpuError::Call {
            call: "cuInit",
            code,
            name: String::new(),
        };
        let old = GpuError::OldDriver {
            found: 12_040,
            needed: 13_000,
        };
        for (error, kind) in [
            (missing("libcuda.so.1"), CudaFaultKind::NoDriver),
            (missing("libcublas.so.13"), CudaFaultKind::NoLibrary),
            (old, CudaFaultKind::OldDriver),
            (call(100), CudaFaultKind::NoDevice),
            (call(803), CudaFaultKind::DriverMismatch),
            (call(999), CudaFaultKind::Refused),
        ] {
            assert_eq!(fault(&error).kind, kind, "{error}");
        }
        let mismatch = nvml_fault(&NvmlError::LibRmVersionMismatch);
        assert_eq!(mismatch.kind, CudaFaultKind::DriverMismatch);
        let other = nvml_fault(&NvmlError::DriverNotLoaded);
        assert_eq!(other.kind, CudaFaultKind::NoMonitoring);
        assert_eq!(spell(12_040), "12.4");
    }

    #[test]
    fn a_host_without_a_driver_has_no_cuda_devices_and_says_why() {
        if driver_is_here() {
            eprintln!("skipped: there is a CUDA driver");
            return;
        }
        assert_eq!(inventory(), []);
        let info = info();
        let kinds: Vec<_> = info.faults.iter().map(|fault| fault.kind).collect();
        assert_eq!(kinds, [CudaFaultKind::NoDriver]);
        assert_eq!(
            (info.version, info.driver, info.devices),
            (None, None, vec![])
        );
    }

    #[test]
    #[ignore = "is run by another test, with libraries of its own"]
    fn with_a_stand_in() {
        let whole = crate::devices::inventory();
        let ids: Vec<&str> = whole.iter().map(|device| device.id.as_str()).collect();
        assert_eq!(ids, ["cuda:0", "cuda:1", "cpu"]);
        assert_eq!((&*whole[0].name, whole[0].many_ranks), ("stand-in", false));
        assert_eq!(
            (whole[0].total_bytes, whole[0].free_bytes),
            (1 << 30, 1 << 30)
        );
        assert_eq!(crate::devices::features(&whole), ["cpu", "cuda"]);
        let info = info();
        assert_eq!(info.version.as_deref(), Some("13.0"));
        assert_eq!(info.devices[0].id, "cuda:0");
        // NVML is not stood in for.
        let other = |fault: &&CudaFault| fault.kind != CudaFaultKind::NoMonitoring;
        assert_eq!(info.faults.iter().find(other), None);
        let device = crate::gpu::CudaDevice::open(0);
        // It cannot run real kernels, yet while it is open its own figures count.
        assert!(device.is_ok(), "{device:?}");
        assert_eq!(inventory()[0].free_bytes, 1 << 29);
    }

    #[test]
    fn devices_come_before_the_cpu() {
        let folder = tempfile::tempdir().unwrap();
        make_stand_in(folder.path(), &STAND_IN);
        let test = "devices::cuda::tests::with_a_stand_in";
        let (passed, said) = run_with(folder.path(), test, "13000");
        assert!(passed, "{said}");
    }
}
