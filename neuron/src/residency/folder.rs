//! The small files of a model folder: what is needed beside the weights to serve it.

use super::single_file;
use crate::text::grammar::Grammars;
use crate::text::template::{ChatTemplate, TemplateError};
use crate::text::tokenizer::{Tokenizer, TokenizerError};
use crate::text::tools::ToolForm;
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Everything a request needs to become tokens and its answer to become text.
#[derive(Debug)]
pub struct ModelText {
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to text.
    pub template: ChatTemplate,
    /// How the model writes calls, which its template shows.
    pub tool_form: ToolForm,
    /// What answers can be held to.
    pub grammars: Grammars,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// What a request gets that does not say how to sample.
    pub sampling: SamplingDefaults,
}

/// The model's own advice on sampling, from generation_config.json.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// Zero where the model is meant to be greedy.
    pub temperature: f64,
    /// Nucleus size.
    pub top_p: f64,
    /// Zero keeps all.
    pub top_k: i64,
    /// Zero keeps all.
    pub min_p: f64,
    /// One changes nothing.
    pub repetition_penalty: f64,
}

/// A model folder that cannot be served: names the file and says what to change.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// There is no such folder.
    #[error(
        "{0} is no folder; name a folder in Hugging Face layout, a GGUF file or a hub id (owner/name)"
    )]
    NoFolder(PathBuf),
    /// A file is not there.
    #[error("{folder} has no {file}; {remedy}")]
    Missing {
        /// The folder.
        folder: PathBuf,
        /// The file.
        file: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A file is there, but cannot be read as what it should be.
    #[error("{path}: {reason}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The template cannot be used.
    #[error("{folder}: {source}")]
    Template {
        /// The folder.
        folder: PathBuf,
        /// Why not.
        source: TemplateError,
    },
    /// Nothing says how an answer ends.
    #[error(
        "{0}: neither generation_config.json nor config.json has an eos_token_id; without one no answer would end"
    )]
    NoEos(PathBuf),
    /// A GGUF file cannot be read.
    #[error(transparent)]
    File(#[from] crate::model::LoadError),
    /// A GGUF file lacks something.
    #[error("{path}: `{key}` {what}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Which of its values.
        key: &'static str,
        /// What is wrong with it.
        what: String,
    },
}

/// `generation_config.json`, as far as it is used.
#[derive(Debug, Default, Deserialize)]
struct GenerationConfig {
    #[serde(default)]
    eos_token_id: Option<Ids>,
    #[serde(default)]
    do_sample: Option<bool>,
    #[serde(default)]
    temperature: Option<f64>,
    #[serde(default)]
    top_p: Option<f64>,
    #[serde(default)]
    top_k: Option<i64>,
    #[serde(default)]
    min_p: Option<f64>,
    #[serde(default)]
    repetition_penalty: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

impl ModelText {
    /// Reads the small files of `folder`, or what a GGUF file has in their place.
    ///
    /// # Errors
    /// The first file that is missing or cannot be used.
    pub fn load(folder: &Path) -> Result<Self, FolderError> {
        if folder.is_file() {
            return single_file::text(folder);
        }
        let config = read_config(folder)?;
        let tokenizer_file = folder.join("tokenizer.json");
        if !tokenizer_file.is_file() {
            return Err(FolderError::Missing {
                folder: folder.into(),
                file: "tokenizer.json",
                remedy: "fetch it with the weights",
            });
        }
        let tokenizer = Arc::new(Tokenizer::load(&tokenizer_file)?);
        let source = read_template(folder)?;
        let generation: GenerationConfig =
            read_json(&folder.join("generation_config.json"))?.unwrap_or_default();
        // Greedy is temperature zero here; transformers spells it `do_sample: false`.
        let temperature = match generation.do_sample {
            Some(false) => 0.0,
            _ => generation.temperature.unwrap_or(1.0),
        };
        let eos = match generation.eos_token_id {
            Some(ids) => ids.into_vec(),
            None => eos_of_config(&config),
        };
        if eos.is_empty() {
            return Err(FolderError::NoEos(folder.into()));
        }
        let sampling = SamplingDefaults {
            temperature,
            top_p: generation.top_p.unwrap_or(1.0),
            top_k: generation.top_k.unwrap_or(0),
            min_p: generation.min_p.unwrap_or(0.0),
            repetition_penalty: generation.repetition_penalty.unwrap_or(1.0),
        };
        Self::new(folder, tokenizer, source, eos, sampling)
    }

    /// The parts put together; `place` is where they are from.
    pub(super) fn new(
        place: &Path,
        tokenizer: Arc<Tokenizer>,
        template: TemplateSource,
        eos: Vec<u32>,
        sampling: SamplingDefaults,
    ) -> Result<Self, FolderError> {
        Ok(Self {
            grammars: Grammars::new(tokenizer.clone(), eos.clone()),
            tokenizer,
            tool_form: ToolForm::of_template(&template.text),
            template: template.compile(place)?,
            eos,
            sampling,
        })
    }
}

/// `config.json`, which every model has.
///
/// # Errors
/// When the folder or the file is missing or is no JSON object.
pub(super) fn read_config(folder: &Path) -> Result<Value, FolderError> {
    if !folder.is_dir() {
        return Err(FolderError::NoFolder(folder.into()));
    }
    read_json(&folder.join("config.json"))?.ok_or_else(|| FolderError::Missing {
        folder: folder.into(),
        file: "config.json",
        remedy: "is it a model folder in Hugging Face layout?",
    })
}

/// The eos ids of `config.json`, also of its `text_config`.
fn eos_of_config(config: &Value) -> Vec<u32> {
    [config, &config["text_config"]]
        .into_iter()
        .filter_map(|config| Option::<Ids>::deserialize(&config["eos_token_id"]).ok()?)
        .flat_map(Ids::into_vec)
        .collect()
}

/// A chat template as written, with the tokens it may name.
pub(super) struct TemplateSource {
    pub(super) text: String,
    pub(super) bos_token: Option<String>,
    pub(super) eos_token: Option<String>,
}

impl TemplateSource {
    fn compile(self, folder: &Path) -> Result<ChatTemplate, FolderError> {
        ChatTemplate::compile(self.text, self.bos_token, self.eos_token).map_err(|source| {
            FolderError::Template {
                folder: folder.into(),
                source,
            }
        })
    }
}

fn read_template(folder: &Path) -> Result<TemplateSource, FolderError> {
    let config: Value = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let path = folder.join("chat_template.jinja");
    let source = match std::fs::read_to_string(&path) {
        Ok(source) => Some(source),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            template_of_config(&config["chat_template"])
        }
        Err(error) => {
            return Err(FolderError::Unreadable {
                path,
                reason: error.to_string(),
            });
        }
    };
    let text = source.ok_or_else(|| FolderError::Missing {
        folder: folder.into(),
        file: "chat_template.jinja",
        remedy: "and tokenizer_config.json has no chat_template; fetch the one of the model",
    })?;
    let token = |name: &str| match &config[name] {
        Value::String(token) => Some(token.clone()),
        token => token["content"].as_str().map(str::to_owned),
    };
    Ok(TemplateSource {
        text,
        bos_token: token("bos_token"),
        eos_token: token("eos_token"),
    })
}

/// A template alone, or the one called `default` of a list of named ones.
fn template_of_config(value: &Value) -> Option<String> {
    match value {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            default
                .or(named.first())
                .and_then(|entry| entry["template"].as_str())
                .map(str::to_owned)
        }
        _ => None,
    }
}

/// The JSON in `path`; none when there is no such file.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(
    path: &Path,
) -> Result<Option<T>, FolderError> {
    let unreadable = |reason: String| FolderError::Unreadable {
        path: path.into(),
        reason,
    };
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| unreadable(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::fixture;
    use serde_json::json;

    /// A copy of the small files of the fixture.
    fn copy() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        ] {
            std::fs::copy(fixture().join(file), folder.path().join(file)).unwrap();
        }
        folder
    }

    fn load_with(file: &str, content: Option<&str>) -> Result<ModelText, FolderError> {
        let folder = copy();
        match content {
            Some(content) => std::fs::write(folder.path().join(file), content).unwrap(),
            None => std::fs::remove_file(folder.path().join(file)).unwrap(),
        }
        ModelText::load(folder.path())
    }

    #[test]
    fn the_fixture_has_both_eos_ids_and_its_own_sampling() {
        let text = ModelText::load(&fixture()).unwrap();
        assert_eq!(text.eos, [481, 479]);
        assert_eq!(text.sampling.top_k, 20);
    }

    #[test]
    fn eos_falls_back_to_config_json_and_its_text_part() {
        let alone = "{\"eos_token_id\": 7}";
        assert_eq!(
            load_with("generation_config.json", Some(alone))
                .unwrap()
                .eos,
            [7]
        );
        assert_eq!(
            eos_of_config(&json!({"eos_token_id": null, "text_config": {"eos_token_id": [1, 2]}})),
            [1, 2]
        );
        let none = load_with("generation_config.json", None).unwrap_err();
        assert!(
            matches!(none, FolderError::NoEos(_)),
            "the fixture's config.json has no eos: {none}"
        );
    }

    #[test]
    fn a_template_may_stand_in_the_tokenizer_config() {
        for config in [
            json!({"chat_template": "hi"}),
            json!({"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "hi"}]}),
        ] {
            let folder = copy();
            std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
            std::fs::write(
                folder.path().join("tokenizer_config.json"),
                config.to_string(),
            )
            .unwrap();
            ModelText::load(folder.path()).unwrap();
        }
    }

    #[test]
    fn every_missing_or_broken_file_is_named() {
        for (file, content, wanted) in [
            ("config.json", None, "config.json"),
            ("config.json", Some("{"), "config.json"),
            ("tokenizer.json", None, "tokenizer.json"),
            ("tokenizer.json", Some("{}"), "tokenizer.json"),
            ("chat_template.jinja", None, "chat_template.jinja"),
            ("chat_template.jinja", Some("{% if %}"), "template"),
            (
                "generation_config.json",
                Some("[]"),
                "generation_config.json",
            ),
        ] {
            let error = load_with(file, content).unwrap_err().to_string();
            assert!(error.contains(wanted), "{file}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let error = ModelText::load(Path::new("/nowhere")).unwrap_err();
        assert!(matches!(error, FolderError::NoFolder(_)), "{error}");
    }
}
