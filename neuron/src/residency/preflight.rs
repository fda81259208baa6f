//! Refuses a load early, before minutes are spent on it.

use super::folder::{FolderError, read_config, read_json};
use crate::model::{LoadError, LoadOptions};
use crate::parallel;
use crate::quant::{self, Format};
use crate::weights::gguf_files;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A load that cannot succeed.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// A file is missing or broken.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// There are no weights.
    #[error("{folder} has no {file}; fetch the weights as safetensors, or name a GGUF file")]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// The file that should be there.
        file: String,
    },
    /// It cannot be shared among so many ranks, or what its files say of themselves cannot be used.
    #[error(transparent)]
    Model(#[from] LoadError),
    /// There is not enough memory.
    #[error(
        "{folder} needs {} in memory and {} are free; unload another model or use a smaller one",
        show(*need),
        show(*free)
    )]
    NoRoom {
        /// The folder.
        folder: PathBuf,
        /// Bytes of weights.
        need: u64,
        /// Bytes free.
        free: u64,
    },
    /// The weights fit, but the state of one sequence of full length does not.
    #[error(
        "{folder}: a sequence of {context} tokens needs {} beside the weights and {} are free; unload another model, or set context_length to {fits} or less",
        show(*need),
        show(*free)
    )]
    ContextTooLong {
        /// The folder.
        folder: PathBuf,
        /// The context it would have.
        context: u64,
        /// Bytes of its state.
        need: u64,
        /// Bytes free.
        free: u64,
        /// The longest that fits.
        fits: u64,
    },
}

/// Bytes for a person.
fn show(bytes: u64) -> String {
    const STEPS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    for (size, unit) in STEPS {
        if bytes >= size {
            return format!("{:.1} {unit}", bytes as f64 / size as f64);
        }
    }
    format!("{bytes} bytes")
}

/// Checks that the weights of `folder` are there and can be shared among `ranks`; tells how many bytes each of them would hold,
/// as `options` want them held.
///
/// # Errors
/// The first reason why a load would fail.
pub fn weigh(
    folder: &Path,
    options: &LoadOptions,
    ranks: usize,
) -> Result<Vec<u64>, PreflightError> {
    let whole = if folder.is_file() {
        need_of_file(folder, options.quant)?
    } else {
        need_of_folder(folder, options.quant)?
    };
    match ranks {
        1 => Ok(vec![whole]),
        // what each holds for itself included
        _ => Ok(parallel::weight_bytes(folder, options, ranks)?),
    }
}

/// Checks that the weights of `folder`, so many bytes, fit into `free`.
///
/// # Errors
/// [`PreflightError::NoRoom`].
pub fn check_weights(folder: &Path, need: u64, free: Option<u64>) -> Result<(), PreflightError> {
    match free {
        Some(free) if need > free => Err(PreflightError::NoRoom {
            folder: folder.into(),
            need,
            free,
        }),
        _ => Ok(()),
    }
}

fn need_of_folder(folder: &Path, quant: Option<Format>) -> Result<u64, PreflightError> {
    let config = read_config(folder)?;
    let mut bytes = 0;
    for file in weight_files(folder)? {
        bytes += length(folder, &folder.join(file))?;
    }
    Ok(match quant {
        Some(format) => (bytes as f64 * size(format) / size(stored(&config))) as u64,
        None => bytes,
    })
}

/// A GGUF file may go on in others.
fn need_of_file(path: &Path, quant: Option<Format>) -> Result<u64, PreflightError> {
    let (files, numbers) = gguf_files(path).map_err(FolderError::from)?;
    let mut bytes = 0;
    for file in files {
        bytes += length(path, &file)?;
    }
    Ok(match quant {
        Some(format) => (numbers as f64 * size(format)) as u64,
        None => bytes,
    })
}

fn length(folder: &Path, file: &Path) -> Result<u64, PreflightError> {
    let found = std::fs::metadata(file).map_err(|_| PreflightError::NoWeights {
        folder: folder.into(),
        file: file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into(),
    })?;
    Ok(found.len())
}

/// Checks that one sequence of `context` tokens fits into `free` bytes.
///
/// # Errors
/// [`PreflightError::ContextTooLong`].
pub fn check_context(
    folder: &Path,
    context: usize,
    free: u64,
    state_bytes: impl Fn(usize) -> u64,
) -> Result<(), PreflightError> {
    let need = state_bytes(context);
    if need <= free {
        return Ok(());
    }
    let (mut fits, mut too_long) = (0, context);
    while too_long - fits > 1 {
        let middle = fits + (too_long - fits) / 2;
        if state_bytes(middle) <= free {
            fits = middle;
        } else {
            too_long = middle;
        }
    }
    Err(PreflightError::ContextTooLong {
        folder: folder.into(),
        context: context as u64,
        need,
        free,
        fits: fits as u64,
    })
}

/// The files that hold the weights: those of the index, or the only one.
pub(super) fn weight_files(folder: &Path) -> Result<Vec<String>, FolderError> {
    let index: Option<Value> = read_json(&folder.join("model.safetensors.index.json"))?;
    let Some(index) = index else {
        return Ok(vec!["model.safetensors".into()]);
    };
    let map = index["weight_map"].as_object();
    let mut files: Vec<String> = map
        .into_iter()
        .flat_map(|map| map.values())
        .filter_map(|file| file.as_str().map(str::to_owned))
        .collect();
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

/// Bytes of a number, on average.
fn size(format: Format) -> f64 {
    const MANY: usize = 1 << 16;
    quant::bytes(format, MANY) as f64 / MANY as f64
}

/// The format most of the weights are stored in.
fn stored(config: &Value) -> Format {
    let named = |config: &Value| {
        let name = config.get("dtype").or(config.get("torch_dtype"))?;
        name.as_str().map(str::to_owned)
    };
    match named(config)
        .or_else(|| named(&config["text_config"]))
        .as_deref()
    {
        Some("bfloat16") => Format::Bf16,
        Some("float16") => Format::F16,
        _ => Format::F32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::fixture;

    #[test]
    fn the_fixtures_pass_and_too_little_memory_does_not() {
        let check = |folder: &Path, options: &LoadOptions, free| {
            let need = weigh(folder, options, 1)?.iter().sum();
            check_weights(folder, need, free)
        };
        let as_stored = LoadOptions::cpu();
        check(&fixture(), &as_stored, None).unwrap();
        let released = fixture().with_file_name("qwen3_5_vl_tied");
        check(&released, &as_stored, Some(1 << 30)).unwrap();
        let error = check(&fixture(), &as_stored, Some(1000)).unwrap_err();
        assert!(matches!(error, PreflightError::NoRoom { .. }), "{error}");
        assert!(error.to_string().contains("1.4 MiB"), "{error}");
        let rounded = LoadOptions {
            quant: Some(Format::Q8_0),
            ..as_stored
        };
        let error = check(&fixture(), &rounded, Some(1000)).unwrap_err();
        assert!(error.to_string().contains("376.2 KiB"), "{error}");
    }

    #[test]
    fn ranks_that_do_not_divide_are_refused_with_those_that_do() {
        for (name, ranks, would_do) in [
            ("qwen3_5_text", 3, &[1, 2, 4][..]),
            ("qwen3_5_text", 8, &[1, 2, 4]),
            ("qwen3_5_vl_tied", 4, &[1, 2]),
            ("qwen3_5_moe_vl", 4, &[1, 2]),
            ("qwen3_next_moe", 6, &[1, 2, 4]),
            ("qwen3_next_dense", 4, &[1, 2]),
        ] {
            let folder = fixture().with_file_name(name);
            let options = LoadOptions::cpu();
            let error = weigh(&folder, &options, ranks).unwrap_err();
            let PreflightError::Model(LoadError::Indivisible(refused)) = &error else {
                panic!("{name}: {error}");
            };
            assert_eq!(refused.fits, would_do, "{name}: {error}");
            assert!(!error.to_string().contains('\n'), "{error}");
            for ranks in would_do {
                weigh(&folder, &options, *ranks).unwrap();
            }
        }
    }

    #[test]
    fn what_ranks_need_is_what_they_hold() {
        for quant in [None, Some(Format::Q8_0), Some(Format::Q4K)] {
            for name in ["qwen3_5_text", "qwen3_next_moe"] {
                let folder = fixture().with_file_name(name);
                let options = LoadOptions {
                    quant,
                    drafts: true,
                    ..LoadOptions::cpu()
                };
                for ranks in [2, 4] {
                    let parts = parallel::weight_bytes(&folder, &options, ranks).unwrap();
                    let need = parts.iter().sum::<u64>();
                    let model = parallel::load(&folder, &options, ranks, &|_| {}).unwrap();
                    assert_eq!(need, model.weight_bytes(), "{name} on {ranks} in {quant:?}");
                }
            }
        }
    }

    #[test]
    fn a_missing_shard_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        let index = "{\"weight_map\": {\"a\": \"one.safetensors\", \"b\": \"one.safetensors\"}}";
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let error = weigh(folder.path(), &LoadOptions::cpu(), 1).unwrap_err();
        assert!(
            matches!(&error, PreflightError::NoWeights { file, .. } if file == "one.safetensors"),
            "{error}"
        );
    }

    #[test]
    fn a_context_too_long_names_one_that_fits() {
        check_context(Path::new("m"), 10, 100, |tokens| tokens as u64 * 10).unwrap();
        let error = check_context(Path::new("m"), 4096, 105, |tokens| tokens as u64 * 10);
        let Err(PreflightError::ContextTooLong { fits, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!(fits, 10);
    }
}
