//! The local cache of the Hugging Face hub, in its layout: `models--org--name/refs/main` names the snapshot.
//!
//! What is complete in the cache is used as it is. What is missing is downloaded, all files of one commit, unless
//! `HF_HUB_OFFLINE` forbids it.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use crate::error::{Error, Result};
use crate::files;

const INDEX: &str = "model.safetensors.index.json";

/// Where the cache is and whether it may be added to.
pub(crate) struct Hub {
    pub(crate) cache: PathBuf,
    pub(crate) offline: bool,
}

impl Hub {
    /// As the environment says: `HF_HUB_CACHE`, else `HF_HOME/hub`, else the user's cache folder.
    pub(crate) fn from_env() -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let cache = var("HF_HUB_CACHE").map(PathBuf::from);
        let cache = cache.or_else(|| var("HF_HOME").map(|home| Path::new(&home).join("hub")));
        let cache = cache.unwrap_or_else(|| Path::new(&var("HOME").unwrap_or_default()).join(".cache/huggingface/hub"));
        let offline = var("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()));
        Self { cache, offline }
    }

    /// Whether a name has the form of a hub id, `org/name`.
    pub(crate) fn is_id(name: &str) -> bool {
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        name.split_once('/').is_some_and(|(org, name)| plain(org) && plain(name))
    }

    /// The folder of the model `id`, and a line saying where it came from.
    pub(crate) fn fetch(&self, id: &str) -> Result<(PathBuf, String)> {
        let cached = self.snapshot(id);
        let missing = cached.as_deref().map(missing).transpose()?;
        if let (Some(folder), Some([])) = (&cached, missing.as_deref()) {
            return Ok((folder.clone(), format!("{id}: found in the hub cache, {}", folder.display())));
        }
        let lacks = match &missing {
            Some(files) => format!("its copy in the hub cache {} lacks {}", self.cache.display(), files.join(", ")),
            None => format!("it is not in the hub cache {}", self.cache.display()),
        };
        let no_such = |reason: String| Error::NoSuchModel { name: id.to_owned(), reason };
        if self.offline {
            return Err(no_such(format!("{lacks}, and HF_HUB_OFFLINE forbids to download it; {HINT}")));
        }
        let folder = self
            .download(id)
            .map_err(|problem| no_such(format!("{lacks}, and downloading failed: {problem}; {HINT}")))?;
        Ok((folder.clone(), format!("{id}: downloaded from the hub to {}", folder.display())))
    }

    fn repo(&self, id: &str) -> PathBuf {
        self.cache.join(format!("models--{}", id.replace('/', "--")))
    }

    /// The snapshot that `refs/main` names, never just any of them.
    fn snapshot(&self, id: &str) -> Option<PathBuf> {
        let repo = self.repo(id);
        let commit = std::fs::read_to_string(repo.join("refs/main")).ok()?;
        let folder = repo.join("snapshots").join(commit.trim());
        (is_commit(commit.trim()) && folder.is_dir()).then_some(folder)
    }

    /// Downloads the files of the newest commit; `refs/main` is moved when the last one is there.
    fn download(&self, id: &str) -> std::result::Result<PathBuf, String> {
        let said = |error: ApiError| error.to_string();
        let mut api = ApiBuilder::from_cache(Cache::new(self.cache.clone())).with_progress(false);
        if let Ok(token) = std::env::var("HF_TOKEN") {
            api = api.with_token(Some(token));
        }
        if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
            api = api.with_endpoint(endpoint);
        }
        let api = api.build().map_err(said)?;
        let info = api.model(id.to_owned()).info().map_err(said)?;
        if !is_commit(&info.sha) {
            return Err(format!("the hub answered with the commit {:?}", info.sha));
        }
        let repo = api.repo(Repo::with_revision(id.to_owned(), RepoType::Model, info.sha.clone()));
        let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
        let weights = if has("model.safetensors") { "model.safetensors" } else { INDEX };
        for name in ["config.json", "tokenizer.json", weights] {
            if !has(name) {
                return Err(format!("the repository has no {name}"));
            }
            repo.get(name).map_err(|error| format!("{name}: {error}"))?;
        }
        for name in ["tokenizer_config.json", "chat_template.jinja"].into_iter().filter(|name| has(name)) {
            repo.get(name).map_err(|error| format!("{name}: {error}"))?;
        }
        let folder = self.repo(id).join("snapshots").join(&info.sha);
        for name in missing(&folder).map_err(|error| error.to_string())? {
            repo.get(&name).map_err(|error| format!("{name}: {error}"))?;
        }
        files::write_atomic(&self.repo(id).join("refs/main"), info.sha.as_bytes())
            .map_err(|error| error.to_string())?;
        Ok(folder)
    }
}

const HINT: &str = "check the spelling, or give a folder with config.json and model.safetensors, a .gguf file, or an embedded one: pocket, pocket-other, tiny-random";

/// A commit is hexadecimal, so that it can lead nowhere else.
fn is_commit(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_hexdigit())
}

/// The files that a snapshot needs and does not have.
fn missing(folder: &Path) -> Result<Vec<String>> {
    let mut needed = vec!["config.json".to_owned(), "tokenizer.json".to_owned()];
    if folder.join(INDEX).exists() && !folder.join("model.safetensors").exists() {
        needed.extend(crate::weights::shard_names(&folder.join(INDEX))?);
    } else {
        needed.push("model.safetensors".to_owned());
    }
    needed.retain(|name| !folder.join(name).exists());
    Ok(needed)
}
