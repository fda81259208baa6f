//! What this host can put a model on.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod metrics;

pub use metrics::register;

use crate::gpu::{Gpu, GpuError};
use crate::kernels::rows::Place;
use protocol::node::{CudaInfo, DeviceInfo};

/// The id of the host's own processors and memory.
pub const CPU: &str = "cpu";

/// The devices that `ranks` of a model are to be on: those that are `wanted`, or else the CUDA devices with the most free
/// memory, or the CPU where there are too few of these. See [`check`] for whether they can be.
#[must_use]
pub fn choose(wanted: &[String], ranks: usize) -> Vec<String> {
    choose_among(inventory(), wanted, ranks)
}

fn choose_among(mut here: Vec<DeviceInfo>, wanted: &[String], ranks: usize) -> Vec<String> {
    if !wanted.is_empty() {
        let single = wanted.iter().filter(|id| *id != CPU);
        let mut chosen: Vec<String> = single.take(ranks).cloned().collect();
        if chosen.len() < ranks {
            chosen = vec![CPU.into()];
        }
        return chosen;
    }
    here.retain(|device| !device.many_ranks);
    if here.len() < ranks {
        return vec![CPU.into()];
    }
    here.sort_by_key(|device| std::cmp::Reverse(device.free_bytes));
    here.truncate(ranks);
    here.into_iter().map(|device| device.id).collect()
}

/// Opens the devices `ids` for a model: where each of its ranks is.
///
/// # Errors
/// When one is not there, or what it needs is missing.
pub fn open(ids: &[String]) -> Result<Vec<Place>, GpuError> {
    let open = |id: &String| match id.as_str() {
        CPU => Ok(Place::Cpu),
        id => open_gpu(id).map(Place::Gpu),
    };
    ids.iter().map(open).collect()
}

/// Where a model is that is to be on the device `id`: the places of its ranks, which on CUDA devices get one each, from
/// this one on.
///
/// # Errors
/// When there is no such device.
pub fn places(id: &str, ranks: usize) -> Result<Vec<Place>, GpuError> {
    if id == CPU {
        return open(&[CPU.into()]);
    }
    let first = ordinal(id)?;
    let ids = (first..first + ranks).map(|ordinal| format!("cuda:{ordinal}"));
    open(&ids.collect::<Vec<_>>())
}

/// The number of the CUDA device `id`.
fn ordinal(id: &str) -> Result<usize, GpuError> {
    let number = id
        .strip_prefix("cuda:")
        .and_then(|number| number.parse().ok());
    number.ok_or_else(|| GpuError::Name(id.into()))
}

/// Opens the CUDA device `id`. Each that is opened has a stream of work of its own.
///
/// # Errors
/// When there is no such device, or what it needs is missing.
pub fn open_gpu(id: &str) -> Result<Gpu, GpuError> {
    let ordinal = ordinal(id)?;
    #[cfg(feature = "cuda")]
    return Ok(Gpu::of_cuda(id, crate::gpu::CudaDevice::open(ordinal)?));
    #[cfg(not(feature = "cuda"))]
    {
        let _ = ordinal;
        Err(GpuError::NotBuilt)
    }
}

/// Every device that can hold a model, with its memory as it is now.
#[must_use]
pub fn inventory() -> Vec<DeviceInfo> {
    #[cfg(feature = "cuda")]
    let others = cuda::inventory();
    #[cfg(not(feature = "cuda"))]
    let others = Vec::new();
    others.into_iter().chain([cpu::describe()]).collect()
}

/// What there is of CUDA; none where this build cannot use it.
#[must_use]
pub fn cuda() -> Option<CudaInfo> {
    #[cfg(feature = "cuda")]
    return Some(cuda::info());
    #[cfg(not(feature = "cuda"))]
    None
}

/// Says in the log what CUDA devices there are, and what keeps them from being used.
pub fn log() {
    let Some(cuda) = cuda() else { return };
    for fault in &cuda.faults {
        tracing::warn!(kind = fault.kind.as_str(), reason = fault.reason, "CUDA");
    }
    let devices = cuda.devices.len();
    tracing::info!(
        devices,
        version = cuda.version,
        driver = cuda.driver,
        "CUDA"
    );
}

/// Bytes free on each of `ids`; none where the system does not tell.
#[must_use]
pub fn free_bytes(ids: &[String]) -> Vec<Option<u64>> {
    if ids.iter().all(|id| id == CPU) {
        let free = cpu::memory().map(|memory| memory.free);
        return vec![free; ids.len()];
    }
    let here = inventory();
    let of = |id: &String| here.iter().find(|device| device.id == *id);
    ids.iter()
        .map(|id| of(id).map(|device| device.free_bytes))
        .collect()
}

/// What this build and host can do, whose devices are `here`, for `GET /discovery`.
#[must_use]
pub fn features(here: &[DeviceInfo]) -> Vec<String> {
    let mut features = vec!["cpu".to_owned()];
    if here.iter().any(|device| device.id.starts_with("cuda:")) {
        features.push("cuda".to_owned());
    }
    features
}

/// A model cannot go where it is wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no such device.
    #[error("there is no device `{device}` here to load models on, only {here}")]
    Unknown {
        /// What was named.
        device: String,
        /// What there is.
        here: String,
    },
    /// A device is named twice.
    #[error("device `{0}` is named twice")]
    Twice(String),
    /// Ranks need a device each.
    #[error(
        "{ranks} ranks need a device each, and {devices} can be had for them; use `tensor_parallel` of {devices} or less"
    )]
    TooFew {
        /// Ranks that were asked for.
        ranks: usize,
        /// Devices for them.
        devices: usize,
    },
}

/// Checks that `ranks` of a model can be on the devices `wanted`, or on those of this host where none are named. A rank needs a
/// device of its own unless the device holds many.
///
/// # Errors
/// Why they cannot.
pub fn check(wanted: &[String], ranks: usize) -> Result<(), Refused> {
    check_among(&inventory(), wanted, ranks)
}

fn check_among(here: &[DeviceInfo], wanted: &[String], ranks: usize) -> Result<(), Refused> {
    for (at, device) in wanted.iter().enumerate() {
        if !here.iter().any(|known| known.id == *device) {
            let names: Vec<String> = here.iter().map(|known| format!("`{}`", known.id)).collect();
            return Err(Refused::Unknown {
                device: device.clone(),
                here: names.join(", "),
            });
        }
        if wanted[..at].contains(device) {
            return Err(Refused::Twice(device.clone()));
        }
    }
    let named = |known: &&DeviceInfo| wanted.is_empty() || wanted.contains(&known.id);
    let (many, single): (Vec<_>, Vec<_>) = here
        .iter()
        .filter(named)
        .partition(|known| known.many_ranks);
    if many.is_empty() && single.len() < ranks {
        return Err(Refused::TooFew {
            ranks,
            devices: single.len(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str, many_ranks: bool) -> DeviceInfo {
        DeviceInfo {
            id: id.into(),
            name: String::new(),
            total_bytes: 0,
            free_bytes: 0,
            many_ranks,
        }
    }

    #[test]
    fn models_go_to_free_devices_and_to_the_cpu_where_there_are_too_few() {
        let ids = |ids: &[&str]| ids.iter().map(ToString::to_string).collect::<Vec<_>>();
        let sized = |id, free_bytes| DeviceInfo {
            free_bytes,
            ..device(id, false)
        };
        let here = || vec![sized("cuda:0", 5), sized("cuda:1", 7), device("cpu", true)];
        let chosen = |wanted: &[&str], ranks| choose_among(here(), &ids(wanted), ranks);
        assert_eq!(chosen(&[], 1), ["cuda:1"]);
        assert_eq!(chosen(&[], 2), ["cuda:1", "cuda:0"]);
        assert_eq!(chosen(&[], 3), ["cpu"]);
        assert_eq!(chosen(&["cuda:0"], 1), ["cuda:0"]);
        assert_eq!(chosen(&["cpu"], 4), ["cpu"]);
        let cpu = vec![device("cpu", true)];
        assert_eq!(choose_among(cpu, &[], 1), ["cpu"]);
        let free = free_bytes(&ids(&["cuda:77", "cpu"]));
        assert!(matches!(free[..], [None, Some(_)]), "{free:?}");
        assert_eq!(free_bytes(&ids(&["cpu"])).len(), 1);
    }

    #[test]
    fn a_cpu_holds_any_number_of_ranks_and_other_devices_one_each() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let cpu = [device("cpu", true)];
        for ranks in [1, 2, 64] {
            check_among(&cpu, &[], ranks).unwrap();
            check_among(&cpu, &names(&["cpu"]), ranks).unwrap();
        }
        let cards = [device("cuda:0", false), device("cuda:1", false)];
        check_among(&cards, &[], 2).unwrap();
        check_among(&cards, &names(&["cuda:1"]), 1).unwrap();
        let too_few = |ranks, devices| Err(Refused::TooFew { ranks, devices });
        assert_eq!(check_among(&cards, &[], 3), too_few(3, 2));
        assert_eq!(check_among(&cards, &names(&["cuda:1"]), 2), too_few(2, 1));
        let twice = check_among(&cards, &names(&["cuda:1", "cuda:1"]), 2);
        assert_eq!(twice, Err(Refused::Twice("cuda:1".into())));
        let unknown = check_among(&cpu, &names(&["cuda:0"]), 1).unwrap_err();
        assert!(matches!(unknown, Refused::Unknown { .. }), "{unknown}");
    }
}
