//! The command line.

use crate::bench::BenchArgs;
use crate::config::{Config, ConfigError, ModelConfig};
use crate::join::Gateway;
use crate::selftest::SelftestArgs;
use crate::verify::VerifyArgs;
use clap::{Args, Parser, Subcommand};
use protocol::node::WeightFormat;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

/// Holds models on this host and runs them in process.
#[derive(Debug, Parser)]
#[command(name = "neuron", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// Something else than to serve.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to serve.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check a configuration file and say what is wrong with it
    Check {
        /// The configuration file
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Hold a model to golden numbers: does this machine compute it right?
    Verify(VerifyArgs),
    /// Measure how fast this machine computes a model
    Bench(BenchArgs),
    /// Test a CUDA device and measure it, with nothing but this program
    Selftest(SelftestArgs),
}

/// How to serve: by a file, or by a model for a quick start.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Serve this model: a folder in Hugging Face layout, a GGUF file or a hub id
    #[arg(long, value_name = "DIR_OR_HUB_ID", conflicts_with = "config")]
    pub model: Option<String>,
    /// The name requests use for it [default: the last part of --model]
    #[arg(long, value_name = "NAME", requires = "model")]
    pub id: Option<String>,
    /// Hold its weights in this number format: f32, f16, bf16, q8_0, q6_k, q5_k or q4_k [default: that of its files]
    #[arg(long, value_name = "FORMAT", requires = "model")]
    pub quant: Option<WeightFormat>,
    /// Share it among this many ranks, each in threads of its own with its part of the weights [default: 1]
    #[arg(long, value_name = "N", requires = "model")]
    pub tensor_parallel: Option<NonZeroU32>,
    /// Where to listen [default: as configured, else 127.0.0.1:13131]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// Become a node of the gateway whose metrics listener is there, like http://cortex:31314
    #[arg(long, value_name = "URL", value_parser = gateway)]
    pub join: Option<String>,
    /// What that gateway wants to be told [default: NEURON_JOIN_TOKEN]
    #[arg(long, value_name = "TOKEN", requires = "join")]
    pub token: Option<String>,
    /// Where that gateway reaches this host [default: the address it sees, and the port of --listen]
    #[arg(long, value_name = "URL", requires = "join")]
    pub advertise: Option<String>,
    /// Stop when standard input is closed: a parent that dies takes this daemon with it
    #[arg(long)]
    pub exit_with_stdin: bool,
}

impl ServeArgs {
    /// The configuration these arguments ask for.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn config(&self) -> Result<Config, ConfigError> {
        let mut config = match &self.config {
            Some(file) => Config::load(file)?,
            None => Config::default_on_this_host()?,
        };
        if let Some(source) = &self.model {
            config.models = vec![ModelConfig {
                id: self.id.clone().unwrap_or_else(|| name_of(source)),
                source: source.clone(),
                context_length: None,
                quant: self.quant,
                tensor_parallel: self.tensor_parallel,
            }];
        }
        if let Some(listen) = self.listen {
            config.listen = listen;
        }
        if let Some(authority) = &self.join {
            let (token, advertise) = (self.token.as_deref(), self.advertise.as_deref());
            config.set_join(authority, token, advertise)?;
        }
        Ok(config)
    }

    /// The model was named on the command line: without it there is nothing to stay up for.
    #[must_use]
    pub fn is_quick_start(&self) -> bool {
        self.model.is_some()
    }
}

/// The host and port of a gateway's URL.
fn gateway(url: &str) -> Result<String, String> {
    Gateway::authority_of(url).ok_or_else(|| "write it like http://cortex:31314".into())
}

/// The last part of a folder, a file or a hub id.
fn name_of(source: &str) -> String {
    let name = source.trim_end_matches('/').rsplit('/').next();
    let name = name.map(|name| name.strip_suffix(".gguf").unwrap_or(name));
    name.filter(|name| !name.is_empty() && !name.starts_with('.'))
        .unwrap_or("model")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn config(arguments: &[&str]) -> Config {
        let arguments = ["neuron"].iter().chain(arguments);
        Cli::try_parse_from(arguments)
            .unwrap()
            .serve
            .config()
            .unwrap()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_quick_start_names_the_model_after_its_source() {
        let config = config(&[
            "--model",
            "/models/qwen3_5_text/",
            "--listen",
            "127.0.0.1:0",
        ]);
        assert_eq!(config.models[0].id, "qwen3_5_text");
        assert_eq!(config.listen.port(), 0);
        let named = ["--model", "owner/name", "--id", "mine"];
        assert_eq!(self::config(&named).models[0].id, "mine");
        assert_eq!(name_of("."), "model");
    }

    #[test]
    fn a_file_and_a_model_exclude_each_other() {
        let both = ["neuron", "--config", "a.toml", "--model", "b"];
        assert!(Cli::try_parse_from(both).is_err());
    }
}
