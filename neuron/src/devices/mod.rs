//! What this host can put a model on.

mod cpu;

use candle_core::Device;
use protocol::node::DeviceInfo;

/// The device models are loaded on.
#[must_use]
pub fn default_device() -> Device {
    Device::Cpu
}

/// Every device that can hold a model, with its memory as it is now.
#[must_use]
pub fn inventory() -> Vec<DeviceInfo> {
    vec![cpu::describe()]
}

/// Bytes free on `device` now; none when the system does not tell.
#[must_use]
pub fn free_bytes(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => cpu::memory().map(|memory| memory.free),
        _ => None,
    }
}

/// The name of `device` as [`DeviceInfo::id`] spells it.
#[must_use]
pub fn id_of(device: &Device) -> String {
    match device {
        Device::Cpu => "cpu".into(),
        other => format!("{:?}", other.location()).to_lowercase(),
    }
}

/// What this build and host can do, for `GET /discovery`.
#[must_use]
pub fn features() -> Vec<String> {
    let mut features = vec!["cpu".to_owned()];
    if candle_core::utils::cuda_is_available() {
        features.push("cuda".to_owned());
    }
    features
}
