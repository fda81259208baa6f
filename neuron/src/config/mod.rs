//! What the daemon was told: a file as written (`settings.rs`) becomes a [`Config`] that needs no more checking.
//!
//! The only place that reads the environment.

mod check;
mod environment;
mod settings;

use crate::join::Gateway;
pub use check::ConfigError;
pub use environment::log_filter;
use protocol::node::WeightFormat;
use settings::Settings;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A checked configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the HTTP API listens.
    pub listen: SocketAddr,
    /// The name the host gives itself in `GET /discovery`.
    pub name: String,
    /// How long running requests may go on after SIGTERM.
    pub drain: Duration,
    /// Models to load at start.
    pub models: Vec<ModelConfig>,
    /// Bounds on what one client can make the daemon do.
    pub limits: Limits,
    /// Where hub models come from.
    pub hub: HubConfig,
    /// How log lines look.
    pub log: LogFormat,
    /// The gateway to join; the command line alone says so.
    pub join: Option<Gateway>,
}

/// A model to load at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelConfig {
    /// The name requests use.
    pub id: String,
    /// A folder or a hub id.
    pub source: String,
    /// Upper bound on prompt plus answer in tokens; the model's own limit when absent.
    pub context_length: Option<u64>,
    /// The number format of its weights in memory; that of the files when absent.
    pub quant: Option<WeightFormat>,
    /// Ranks among which it is shared; one when absent.
    pub tensor_parallel: Option<NonZeroU32>,
}

/// Bounds on what one client can make the daemon do. The counts hold for each model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest request body in bytes.
    pub max_body_bytes: usize,
    /// Sequences computed at the same time.
    pub max_running: usize,
    /// Requests that may wait for one of those places.
    pub max_waiting: usize,
    /// Prompt tokens that may wait, over all waiting requests.
    pub max_queued_prompt_tokens: usize,
    /// Prompt tokens computed in one step beside the decoding rows; what fits the device when absent.
    pub prefill_chunk_tokens: Option<usize>,
    /// Bytes that the states of one model may take; as much as is of use when absent. All models together never take more
    /// than there is.
    pub state_bytes: Option<u64>,
    /// Bytes of the host's memory that saved states of a model on devices may be moved to; a quarter of what is free when absent.
    pub host_snapshot_bytes: Option<u64>,
    /// Whether what sequences computed is kept for later ones.
    pub prefix_cache: bool,
    /// Tokens guessed ahead by models that have a layer for it; zero guesses none.
    pub draft_tokens: usize,
    /// From arrival to the last token.
    pub request_deadline: Duration,
}

/// Where hub models come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubConfig {
    /// The cache folder, in the layout all Hugging Face tools share.
    pub cache_dir: PathBuf,
    /// Use the cache alone.
    pub offline: bool,
    /// The server, when it is not huggingface.co.
    pub endpoint: Option<String>,
    /// For gated models.
    pub token: Option<String>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Config {
    /// The configuration with every key at its default.
    ///
    /// # Errors
    /// When the defaults cannot be met on this host, for example without a home folder.
    pub fn default_on_this_host() -> Result<Self, ConfigError> {
        check::check(Settings::default(), Path::new("defaults"))
    }

    /// Has the host join the gateway at `authority`. Without a token, `NEURON_JOIN_TOKEN` holds it.
    ///
    /// # Errors
    /// When there is no token.
    pub fn set_join(
        &mut self,
        authority: &str,
        token: Option<&str>,
        advertise: Option<&str>,
    ) -> Result<(), ConfigError> {
        let token = token.map(str::to_owned).or_else(environment::join_token);
        let token = token.ok_or_else(|| {
            let remedy = "needs a token; give --token or set NEURON_JOIN_TOKEN";
            ConfigError::new(Path::new("arguments"), "--join", remedy)
        })?;
        self.join = Some(Gateway {
            authority: authority.into(),
            token,
            advertise: advertise.map(str::to_owned),
        });
        Ok(())
    }

    /// Reads and checks `file`.
    ///
    /// # Errors
    /// One line that names the file, the key and what to change.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        check::check(Settings::read(file)?, file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("neuron.toml");
        std::fs::write(&file, text).unwrap();
        Config::load(&file)
    }

    #[test]
    fn the_sample_file_shows_every_key_with_its_default() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf/neuron.toml");
        let sample = std::fs::read_to_string(&path).unwrap();
        // Commented keys are those whose default depends on the host, and the model list: uncomment
        // them to see that they are accepted as written.
        let whole: String = sample
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(line))
            .collect::<Vec<_>>()
            .join("\n");
        assert_eq!(
            Config::load(&path).unwrap(),
            Config::default_on_this_host().unwrap(),
            "the sample as shipped is the defaults"
        );
        let keys = toml::to_string(&Settings::sample()).unwrap();
        for key in keys.lines().filter_map(|line| line.split(" = ").next()) {
            assert!(
                key.starts_with('[') || whole.contains(&format!("{key} = ")),
                "conf/neuron.toml does not show `{key}`"
            );
        }
        load(&whole).expect("the commented keys are valid too");
    }

    #[test]
    fn a_bad_file_gives_one_line_with_file_key_and_remedy() {
        for (text, wanted) in [
            ("listne = \"x\"", "listne"),
            ("listen = \"nowhere\"", "listen"),
            ("listen = 5", "listen"),
            ("[limits]\nmax_running = 0", "limits.max_running"),
            ("[limits]\nmax_body_bytes = -1", "max_body_bytes"),
            ("[[models]]\nid = \"a\"", "source"),
            (
                "[[models]]\nid = \"a\"\nsource = \"b\"\n[[models]]\nid = \"a\"\nsource = \"c\"",
                "models[1].id",
            ),
            (
                "[[models]]\nid = \"a\"\nsource = \"b\"\ntensor_parallel = 0",
                "tensor_parallel",
            ),
            ("[log]\nformat = \"xml\"", "format"),
            ("listen = ", "line 1"),
        ] {
            let message = load(text).unwrap_err().to_string();
            assert!(message.contains("neuron.toml"), "{message}");
            assert!(message.contains(wanted), "{wanted:?} not in {message:?}");
            assert!(!message.contains('\n'), "more than one line: {message:?}");
        }
        let missing = Config::load(Path::new("/nowhere/neuron.toml")).unwrap_err();
        assert!(missing.to_string().starts_with("/nowhere/neuron.toml: "));
    }
}
