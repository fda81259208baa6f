//! The fleet protocol: what a neuron tells cortex about itself and what it can be told to do.
//!
//! `GET /discovery` → [`NodeInfo`] · `GET /models` → [`NodeModels`] · `GET /models/{id}` → [`ModelStatus`] ·
//! `POST /models/load` takes [`LoadModel`] and answers 202 with a [`ModelStatus`] ·
//! `POST /models/unload` takes [`UnloadModel`] and answers 200 with a [`ModelStatus`].

use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

/// A host as it describes itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Host name.
    pub host: String,
    /// Version of the daemon.
    pub version: String,
    /// Devices that can hold a model, the CPU included.
    pub devices: Vec<DeviceInfo>,
    /// What this build and host can do: `cpu`, `cuda`, …
    #[serde(default)]
    pub features: Vec<String>,
    /// What there is of CUDA; absent where the build cannot use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda: Option<CudaInfo>,
}

/// What a build that can use CUDA finds on its host. The word `cuda` is among the [features](NodeInfo::features) where
/// models can be put on a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CudaInfo {
    /// The version of CUDA that the driver speaks, as `13.0`; absent without a driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The driver's own version, as `580.65.06`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// Every device, as it is used at this moment.
    #[serde(default)]
    pub devices: Vec<CudaUse>,
    /// What is amiss.
    #[serde(default)]
    pub faults: Vec<CudaFault>,
}

/// How a CUDA device is used, by all processes of its host. What is unknown is absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CudaUse {
    /// The [`DeviceInfo::id`].
    pub id: String,
    /// Share of the last moments in which a kernel ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utilization_percent: Option<u32>,
    /// How hot it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature_celsius: Option<u32>,
    /// Bytes of its memory that are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    /// Processes that compute on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
}

/// Something that keeps CUDA devices from being used, or from being watched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CudaFault {
    /// What it is.
    pub kind: CudaFaultKind,
    /// What the host says of it.
    #[serde(default)]
    pub reason: String,
}

/// Kinds of [`CudaFault`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CudaFaultKind {
    /// The host has no driver.
    NoDriver,
    /// The driver does not read the kernels of this build.
    OldDriver,
    /// Parts of the driver are of different versions, as after an update without a restart.
    DriverMismatch,
    /// The driver knows no device.
    NoDevice,
    /// A library that models need is missing.
    NoLibrary,
    /// Devices cannot be watched; they can be used.
    NoMonitoring,
    /// The driver refuses something else.
    #[serde(other)]
    Refused,
}

impl CudaFaultKind {
    /// The word used on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoDriver => "no_driver",
            Self::OldDriver => "old_driver",
            Self::DriverMismatch => "driver_mismatch",
            Self::NoDevice => "no_device",
            Self::NoLibrary => "no_library",
            Self::NoMonitoring => "no_monitoring",
            Self::Refused => "refused",
        }
    }
}

/// One device that can hold a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// `cpu`, `cuda:0`, …
    pub id: String,
    /// What a person calls it.
    pub name: String,
    /// Memory in bytes that models may use.
    pub total_bytes: u64,
    /// Bytes of it free now.
    pub free_bytes: u64,
    /// Whether it holds any number of ranks of one model, as a CPU does, where ranks are threads; other devices hold one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub many_ranks: bool,
}

/// Where a model stands on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelState {
    /// Being read; requests are answered 503.
    Loading,
    /// Serves requests.
    Loaded,
    /// Loading or running it failed; `reason` says why. Holds no memory.
    Failed,
    /// Takes no new requests; goes away when the running ones have ended.
    Unloading,
}

impl ModelState {
    /// The word used on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Loaded => "loaded",
            Self::Failed => "failed",
            Self::Unloading => "unloading",
        }
    }
}

/// One model on a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// The name requests use.
    pub id: String,
    /// Where it stands.
    pub state: ModelState,
    /// Share of the load done, 0 to 1.
    #[serde(default)]
    pub progress: f32,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The folder or hub id it was loaded from.
    #[serde(default)]
    pub source: String,
    /// Devices that hold it.
    #[serde(default)]
    pub devices: Vec<String>,
    /// The ranks it is shared among, in their order, one where it is whole; none before it is loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<RankStatus>,
    /// Bytes it holds on them: weights and state.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Longest prompt plus answer in tokens; zero while unknown.
    #[serde(default)]
    pub context_length: u64,
    /// What it can do: `chat`, `completions`, `tools`, `thinking`, `images`, `structured_outputs`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// Requests running or waiting on it.
    #[serde(default)]
    pub in_flight: u64,
    /// Unix seconds since which it has been in this state.
    #[serde(default)]
    pub since: u64,
}

/// One rank of a model on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankStatus {
    /// Its number, from 0.
    pub rank: u32,
    /// Where it stands.
    pub state: RankState,
    /// The device it is on; ranks on a CPU share it.
    #[serde(default)]
    pub device: String,
    /// Bytes of weights it holds.
    #[serde(default)]
    pub weight_bytes: u64,
}

/// Where a rank of a model stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RankState {
    /// It computes.
    Loaded,
    /// It is what the model failed by. Holds no memory.
    Failed,
    /// It was well, and ended with the model. Holds no memory.
    Ended,
}

impl RankState {
    /// The word used on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loaded => "loaded",
            Self::Failed => "failed",
            Self::Ended => "ended",
        }
    }
}

/// The reply of `GET /models`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeModels {
    /// Every model the node knows, sorted by id.
    pub models: Vec<ModelStatus>,
}

/// How a node says to a gateway that it is there: `POST /nodes` on the gateway's second listener, with the gateway's
/// token as `authorization: Bearer`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// What it wants to be called.
    pub name: String,
    /// Where it listens; `None` is the address that this request comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Where it listens there.
    pub port: u16,
}

/// The reply to a [`Join`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// When to say so again, so as to stay.
    pub again_in_seconds: u64,
}

/// Asks a node to load a model. Idempotent: a second call joins the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadModel {
    /// The name requests will use.
    pub id: String,
    /// A folder in Hugging Face layout, a GGUF file, or a hub id (`owner/name`).
    pub source: String,
    /// Upper bound on prompt plus answer in tokens; the model's own limit when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u64>,
    /// The number format to hold weights in; that of the files when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quant: Option<WeightFormat>,
    /// Ranks among which the model is shared, each with its part of the weights and on a device of its own where that does
    /// not hold [many](DeviceInfo::many_ranks); one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor_parallel: Option<NonZeroU32>,
    /// The devices to hold it, by their [`DeviceInfo::id`], the same share on each; the node's choice when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
}

impl LoadModel {
    /// Ranks among which the model is shared, 1 or more.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.tensor_parallel.map_or(1, |ranks| ranks.get() as usize)
    }
}

/// How the numbers of a model's weight matrices are held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// 4 bytes.
    F32,
    /// 2 bytes, up to 65504.
    F16,
    /// 2 bytes: the upper half of an f32.
    Bf16,
    /// 34 bytes for 32 numbers: 8 bits each and a common scale (as `Q8_0` in GGUF files).
    Q8_0,
    /// 210 bytes for 256 numbers: 6 bits each, a scale of 8 bits for 16 (as `Q6_K` in GGUF files).
    #[serde(rename = "q6_k")]
    Q6K,
    /// 176 bytes for 256 numbers: 5 bits each, scale and offset of 6 bits for 32 (as `Q5_K` in GGUF files).
    #[serde(rename = "q5_k")]
    Q5K,
    /// 144 bytes for 256 numbers: 4 bits each, scale and offset of 6 bits for 32 (as `Q4_K` in GGUF files).
    #[serde(rename = "q4_k")]
    Q4K,
}

/// A name that is no [`WeightFormat`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownFormat(String);

impl WeightFormat {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q6K,
        Self::Q5K,
        Self::Q4K,
    ];

    /// The word used on the wire, in files and on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q6K => "q6_k",
            Self::Q5K => "q5_k",
            Self::Q4K => "q4_k",
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for WeightFormat {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        let named = Self::ALL.into_iter().find(|format| format.as_str() == name);
        named.ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

impl fmt::Display for UnknownFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = WeightFormat::ALL.map(WeightFormat::as_str).join(", ");
        write!(f, "\"{}\" is no number format; there are {all}", self.0)
    }
}

impl std::error::Error for UnknownFormat {}

/// Asks a node to let a model go once its requests have ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnloadModel {
    /// The model's name.
    pub id: String,
}
