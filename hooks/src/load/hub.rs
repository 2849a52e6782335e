//! The local cache of the Hugging Face hub, in its layout: `models--org--name/refs/main` names the snapshot.
//!
//! Complete files in the cache are used as they are. Missing ones are downloaded, all of one commit, unless
//! `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` forbids it. The environment is read as `huggingface_hub` reads it.

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use crate::error::{Error, Result, malformed};
use crate::load::files;

const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The place of the cache, and whether downloads may add to it.
pub(crate) struct Hub {
    pub(crate) cache: PathBuf,
    /// The environment variable that forbids downloads, if one does.
    pub(crate) offline: Option<&'static str>,
}

/// The name of a folder on the hub: `org/name`, optionally with `@revision` (a branch, a tag, a commit) and `:folder`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct HubId<'a> {
    repo: &'a str,
    revision: Option<&'a str>,
    folder: Option<&'a str>,
}

/// The use of a hub folder, which decides the files that it needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Model,
    Adapter,
}

/// Finds a file of a snapshot that should be a link into the cache's blobs but contains the link's path as text.
fn link_as_text(snapshot: &Path) -> Option<PathBuf> {
    let paths = fs::read_dir(snapshot).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_short = |path: &PathBuf| path.metadata().is_ok_and(|file| file.is_file() && file.len() < 256);
    paths
        .filter(is_short)
        .find(|path| fs::read_to_string(path).is_ok_and(|text| text.starts_with("../") && text.contains("/blobs/")))
}

/// The folder of an adapter, given by its path or by its hub id: `org/name`, with `@revision` if it is not in the
/// newest commit of the main branch, and with `:folder` if it is not at the repository's top. An id that is not in the
/// hub's cache is downloaded, unless `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` forbids it. A path that does not exist
/// is returned as it is.
pub fn adapter_folder(name: &Path) -> Result<PathBuf> {
    find_adapter(name, &Hub::from_env())
}

fn find_adapter(name: &Path, hub: &Hub) -> Result<PathBuf> {
    if name.is_file() {
        let folder = files::folder_of(name);
        let problem = "it is a file, expected an adapter's folder".to_owned();
        return Err(Error::Adapter { path: name.to_owned(), problem }.with_hint(format!("give {}", folder.display())));
    }
    if name.join(CONFIG).is_file() && !name.join(ADAPTER[0]).exists() {
        let problem = "it is a model, not an adapter".to_owned();
        return Err(Error::Adapter { path: name.to_owned(), problem }.with_hint(format!("--model {}", name.display())));
    }
    match name.to_str().filter(|_| !name.is_dir()).and_then(HubId::parse) {
        Some(id) => Ok(hub.fetch(&id, Wanted::Adapter).map_err(|error| of_an_adapter(error, name))?.0),
        None => Ok(name.to_owned()),
    }
}

/// Turns the error for a hub id without a model into the error for one without an adapter.
fn of_an_adapter(error: Error, name: &Path) -> Error {
    match error {
        Error::NoSuchModel { reason, .. } => {
            Error::Adapter { path: name.to_owned(), problem: format!("there is no such folder, and {reason}") }
        }
        Error::Hinted { error, hint } => of_an_adapter(*error, name).with_hint(hint),
        other => other,
    }
}

impl<'a> HubId<'a> {
    /// Parses a hub id; `None` if the name does not have this form. No part of an id can lead out of the cache.
    pub(crate) fn parse(name: &'a str) -> Option<Self> {
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let path = |parts: &&str| parts.split('/').all(plain);
        let (name, folder) = name.split_once(':').map_or((name, None), |(name, folder)| (name, Some(folder)));
        let (repo, revision) = name.split_once('@').map_or((name, None), |(name, revision)| (name, Some(revision)));
        let is_id = repo.split_once('/').is_some_and(|(org, name)| plain(org) && plain(name));
        let is_whole = [revision, folder].iter().flatten().all(path);
        (is_id && is_whole).then_some(Self { repo, revision, folder })
    }

    /// The path in the repository of a file in the folder.
    fn file(&self, name: &str) -> String {
        self.folder.map_or_else(|| name.to_owned(), |folder| format!("{folder}/{name}"))
    }

    fn revision(&self) -> &str {
        self.revision.unwrap_or("main")
    }
}

impl std::fmt::Display for HubId<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.repo)?;
        self.revision.map_or(Ok(()), |revision| write!(f, "@{revision}"))?;
        self.folder.map_or(Ok(()), |folder| write!(f, ":{folder}"))
    }
}

impl Hub {
    /// Reads the environment. The cache is the first of these that is set, as for `huggingface_hub`: `HF_HUB_CACHE`,
    /// `HUGGINGFACE_HUB_CACHE`, `HF_HOME/hub`, `XDG_CACHE_HOME/huggingface/hub`, `~/.cache/huggingface/hub`.
    pub(crate) fn from_env() -> Self {
        Self::of(&|name| std::env::var(name).ok())
    }

    fn of(var: &dyn Fn(&str) -> Option<String>) -> Self {
        let join = |folder: &str, name: &str| Path::new(folder).join(name).to_string_lossy().into_owned();
        let caches = || var("XDG_CACHE_HOME").unwrap_or_else(|| expanded("~/.cache", var));
        let home = || expanded(&var("HF_HOME").unwrap_or_else(|| join(&caches(), "huggingface")), var);
        let cache = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE"));
        let cache = expanded(&cache.unwrap_or_else(|| join(&home(), "hub")), var);
        let said = |name| var(name).filter(|value| !value.is_empty()).map(|value| (name, value.to_uppercase()));
        let heard = said("HF_HUB_OFFLINE").or_else(|| said("TRANSFORMERS_OFFLINE"));
        let offline = heard.filter(|(_, value)| ["1", "ON", "YES", "TRUE"].contains(&value.as_str()));
        Self { cache: PathBuf::from(cache), offline: offline.map(|(name, _)| name) }
    }

    /// The folder that `id` names, and a line that says how it was found.
    pub(crate) fn fetch(&self, id: &HubId<'_>, wanted: Wanted) -> Result<(PathBuf, String)> {
        let no_such = |reason: String| Error::NoSuchModel { name: id.to_string(), reason };
        let cached = self.snapshot(id)?.map(|snapshot| match id.folder {
            Some(folder) => snapshot.join(folder),
            None => snapshot,
        });
        let missing = cached.as_deref().map(|folder| missing(folder, wanted)).transpose()?;
        if let (Some(folder), Some([])) = (&cached, missing.as_deref()) {
            if let Some(path) = link_as_text(folder) {
                let problem =
                    "it holds the path of another file, expected the file: the cache was copied without its links"
                        .to_owned();
                let hint = "copy it with them (cp -a), or with what they lead to (cp -rL)";
                return Err(malformed(&path, problem).with_hint(hint));
            }
            return Ok((folder.clone(), format!("{id}: found in the hub cache, {}", folder.display())));
        }
        let cache = self.cache.display();
        let lacks = match (&missing, &cached) {
            (Some(files), Some(folder)) => {
                let others = adapters_below(id, wanted, &files::folders_with(folder, ADAPTER[0]));
                format!("its copy in the hub cache {cache} lacks {}{others}", files.join(", "))
            }
            _ => format!("it is not in the hub cache {cache}{}", self.snapshots_beside(id)),
        };
        let hint = if wanted == Wanted::Model { MODEL_HINT } else { ADAPTER_HINT };
        if let Some(variable) = self.offline {
            return Err(no_such(format!("{lacks}, and {variable} forbids to download it; {hint}")));
        }
        let failed = |problem: String| no_such(format!("{lacks}, and downloading failed: {problem}; {hint}"));
        let folder = self.download(id, wanted).map_err(failed)?;
        Ok((folder.clone(), format!("{id}: downloaded from the hub to {}", folder.display())))
    }

    fn repo(&self, id: &HubId<'_>) -> PathBuf {
        self.cache.join(format!("models--{}", id.repo.replace('/', "--")))
    }

    /// The snapshot of the revision, which is a reference or a commit. Without a revision it is the snapshot that
    /// `refs/main` names, or the only one if there is no `refs/main`; several snapshots without a `refs/main` are an
    /// error.
    fn snapshot(&self, id: &HubId<'_>) -> Result<Option<PathBuf>> {
        let repo = self.repo(id);
        let reference = repo.join("refs").join(id.revision());
        let commit = match (fs::read_to_string(&reference), id.revision) {
            (Ok(text), _) if is_commit(text.trim()) => text.trim().to_owned(),
            (Ok(text), _) => {
                let problem = format!("it holds {text:?}, expected a commit");
                return Err(malformed(&reference, problem));
            }
            (Err(_), Some(revision)) if is_commit(revision) => revision.to_owned(),
            (Err(_), Some(_)) => return Ok(None),
            (Err(_), None) => match &self.snapshots(id)[..] {
                [] => return Ok(None),
                [only] => only.clone(),
                several => {
                    let reason = format!(
                        "the hub cache {} has {} snapshots of it and no refs/main that says which is meant: {}",
                        self.cache.display(),
                        several.len(),
                        several.join(", ")
                    );
                    let hint = format!("give {}@COMMIT", id.repo);
                    return Err(Error::NoSuchModel { name: id.to_string(), reason }.with_hint(hint));
                }
            },
        };
        let folder = repo.join("snapshots").join(commit);
        Ok(folder.is_dir().then_some(folder))
    }

    /// The commits whose snapshots are in the cache, sorted.
    fn snapshots(&self, id: &HubId<'_>) -> Vec<String> {
        let entries = fs::read_dir(self.repo(id).join("snapshots")).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut commits: Vec<String> = names.filter(|name| is_commit(name)).collect();
        commits.sort();
        commits
    }

    /// The end of a sentence that lists the other commits in the cache.
    fn snapshots_beside(&self, id: &HubId<'_>) -> String {
        match &self.snapshots(id)[..] {
            [] => String::new(),
            others => format!(", which has other commits of it ({})", others.join(", ")),
        }
    }

    /// Downloads the files of the revision's newest commit. The reference is updated after the last file.
    fn download(&self, id: &HubId<'_>, wanted: Wanted) -> std::result::Result<PathBuf, String> {
        let said = |error: ApiError| error.to_string();
        let mut api = ApiBuilder::from_cache(Cache::new(self.cache.clone())).with_progress(false);
        if let Ok(token) = std::env::var("HF_TOKEN") {
            api = api.with_token(Some(token));
        }
        if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
            api = api.with_endpoint(endpoint);
        }
        let api = api.build().map_err(said)?;
        let revision = |revision: &str| Repo::with_revision(id.repo.to_owned(), RepoType::Model, revision.to_owned());
        let info = api.repo(revision(id.revision())).info().map_err(said)?;
        if !is_commit(&info.sha) {
            return Err(format!("the hub answered with the commit {:?}", info.sha));
        }
        let repo = api.repo(revision(&info.sha));
        let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
        let (needed, beside): (Vec<&str>, &[&str]) = match wanted {
            Wanted::Adapter => (ADAPTER.to_vec(), &[]),
            Wanted::Model if has(&id.file(ADAPTER[0])) && !has(&id.file(CONFIG)) => {
                return Err("the repository holds an adapter, no model; give it as --adapter, and its base as --model"
                    .to_owned());
            }
            Wanted::Model => {
                let weights = if has(&id.file("model.safetensors")) { "model.safetensors" } else { INDEX };
                let beside = &["tokenizer_config.json", "added_tokens.json", "chat_template.jinja"];
                (vec![CONFIG, "tokenizer.json", weights], beside)
            }
        };
        let get = |name: &str| repo.get(name).map_err(|error| format!("{name}: {error}"));
        for name in needed.into_iter().map(|name| id.file(name)) {
            if !has(&name) {
                let paths = info.siblings.iter().map(|file| file.rfilename.as_str());
                let folders: Vec<String> = paths
                    .filter_map(|path| Some(path.strip_suffix(ADAPTER[0])?.strip_suffix('/')?.to_owned()))
                    .collect();
                let others = adapters_below(id, wanted, &folders);
                return Err(format!("the repository has no {name}{others}"));
            }
            get(&name)?;
        }
        for name in beside.iter().map(|name| id.file(name)).filter(|name| has(name)) {
            get(&name)?;
        }
        let snapshot = self.repo(id).join("snapshots").join(&info.sha);
        let folder = id.folder.map_or_else(|| snapshot.clone(), |folder| snapshot.join(folder));
        for name in missing(&folder, wanted).map_err(|error| error.to_string())? {
            get(&id.file(&name))?;
        }
        if !is_commit(id.revision()) {
            files::write_atomic(&self.repo(id).join("refs").join(id.revision()), info.sha.as_bytes())
                .map_err(|error| error.to_string())?;
        }
        Ok(folder)
    }
}

const MODEL_HINT: &str = "check the spelling, or give a folder with config.json and model.safetensors, a .gguf file, or an embedded one: pocket, pocket-other, tiny-random";
const ADAPTER_HINT: &str =
    "check the spelling, or give a folder with adapter_config.json and adapter_model.safetensors";

/// A path as Python's `expandvars(expanduser(path))` gives it: expands a leading `~`, then `$NAME` and `${NAME}`. Unset
/// variables stay as they are.
fn expanded(path: &str, var: &dyn Fn(&str) -> Option<String>) -> String {
    let home = || var("HOME").or_else(|| Some(std::env::home_dir()?.to_string_lossy().into_owned()));
    let path = match path.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/')).zip(home()) {
        Some((rest, home)) => format!("{}{rest}", home.trim_end_matches('/')),
        None => path.to_owned(),
    };
    let mut parts = path.split('$');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) = match part.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some(braced) => braced,
            None => part.split_at(part.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(part.len())),
        };
        match var(name).filter(|_| !name.is_empty()) {
            Some(value) => text.extend([&value, rest]),
            None => text.extend(["$", part]),
        }
    }
    text
}

/// Whether a text is a hexadecimal commit, which cannot lead out of the cache.
fn is_commit(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_hexdigit())
}

/// The files that a folder needs and lacks. If a model is wanted and the folder has an adapter, none are needed:
/// opening it gives a better error.
fn missing(folder: &Path, wanted: Wanted) -> Result<Vec<String>> {
    let has = |name: &str| folder.join(name).exists();
    let mut needed = match wanted {
        Wanted::Adapter => ADAPTER.map(str::to_owned).to_vec(),
        Wanted::Model if has(ADAPTER[0]) && !has(CONFIG) => vec![],
        Wanted::Model => {
            let weights = if has(INDEX) && !has("model.safetensors") {
                crate::load::weights::shard_names(&folder.join(INDEX))?.into_iter().collect()
            } else {
                vec!["model.safetensors".to_owned()]
            };
            [CONFIG, "tokenizer.json"].map(str::to_owned).into_iter().chain(weights).collect()
        }
    };
    needed.retain(|name| !has(name));
    Ok(needed)
}

/// The end of a sentence that lists the folders of a repository's adapters, if an adapter is wanted.
fn adapters_below(id: &HubId<'_>, wanted: Wanted, folders: &[String]) -> String {
    let names: Vec<String> = folders.iter().take(10).map(|folder| format!("{}:{folder}", id.repo)).collect();
    let is_empty = wanted == Wanted::Model || names.is_empty();
    if is_empty { String::new() } else { format!(" (there is {})", names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_a_revision_and_a_folder_and_leads_nowhere_else() {
        let id = |repo, revision, folder| Some(HubId { repo, revision, folder });
        for (name, expected) in [
            ("Qwen/Qwen2.5-0.5B", id("Qwen/Qwen2.5-0.5B", None, None)),
            ("o/n@v1.0", id("o/n", Some("v1.0"), None)),
            ("o/n@refs/pr/3", id("o/n", Some("refs/pr/3"), None)),
            ("o/n:checkpoint-100", id("o/n", None, Some("checkpoint-100"))),
            ("o/n@beef:a/b", id("o/n", Some("beef"), Some("a/b"))),
        ] {
            let parsed = HubId::parse(name);
            assert_eq!(parsed, expected);
            assert_eq!(parsed.unwrap().to_string(), name);
        }
        for name in [
            "",
            "qwen",
            "a/b/c",
            "../b",
            "a/..",
            "/a/b",
            "a/b@",
            "a/b:",
            "a/b@..",
            "a/b@a/../c",
            "a/b:..",
            "a/b:/c",
            "a/b:c//d",
            "a/b:c@d",
            "a/b@c:d:e",
            "a b/c",
            "a/b:c/../../d",
        ] {
            assert_eq!(HubId::parse(name), None, "{name}");
        }
    }

    /// The values that `huggingface_hub` 2.4 computes from the same environments, with the home folder `/h`.
    #[test]
    fn the_environment_is_read_as_huggingface_hub_reads_it() {
        for (environment, cache, offline) in [
            (&[][..], "/h/.cache/huggingface/hub", None),
            (&[("HF_HOME", "/x")], "/x/hub", None),
            (&[("HF_HOME", "~/x")], "/h/x/hub", None),
            (&[("HF_HOME", "$HOME/x")], "/h/x/hub", None),
            (&[("HF_HOME", "${HOME}/x$NONE/${NONE}/$")], "/h/x$NONE/${NONE}/$/hub", None),
            (&[("HF_HOME", "~x/y")], "~x/y/hub", None),
            (&[("HF_HOME", "")], "hub", None),
            (&[("XDG_CACHE_HOME", "~/c")], "/h/c/huggingface/hub", None),
            (&[("XDG_CACHE_HOME", "/c"), ("HF_HOME", "/x")], "/x/hub", None),
            (&[("HUGGINGFACE_HUB_CACHE", "~/old"), ("HF_HOME", "/x")], "/h/old", None),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "$HOME/new")], "/h/new", None),
            (&[("HF_HUB_OFFLINE", "1")], "/h/.cache/huggingface/hub", Some("HF_HUB_OFFLINE")),
            (&[("HF_HUB_OFFLINE", "yEs")], "/h/.cache/huggingface/hub", Some("HF_HUB_OFFLINE")),
            (&[("HF_HUB_OFFLINE", "y")], "/h/.cache/huggingface/hub", None),
            (&[("TRANSFORMERS_OFFLINE", "ON")], "/h/.cache/huggingface/hub", Some("TRANSFORMERS_OFFLINE")),
            (
                &[("TRANSFORMERS_OFFLINE", "true"), ("HF_HUB_OFFLINE", "")],
                "/h/.cache/huggingface/hub",
                Some("TRANSFORMERS_OFFLINE"),
            ),
            (&[("TRANSFORMERS_OFFLINE", "true"), ("HF_HUB_OFFLINE", "0")], "/h/.cache/huggingface/hub", None),
        ] {
            let var = |name: &str| {
                let set = environment.iter().chain(&[("HOME", "/h")]).find(|(set, _)| *set == name);
                set.map(|(_, value)| (*value).to_owned())
            };
            let hub = Hub::of(&var);
            assert_eq!((hub.cache.to_str().unwrap(), hub.offline), (cache, offline), "{environment:?}");
        }
    }

    #[test]
    fn an_adapter_is_found_in_the_cache_and_told_where_else_there_is_one() {
        let cache = tempfile::tempdir().unwrap();
        let mut hub = Hub { cache: cache.path().to_owned(), offline: Some("TRANSFORMERS_OFFLINE") };
        let refused = |hub: &Hub| find_adapter(Path::new("Org/owl"), hub).unwrap_err().to_string();
        assert!(refused(&hub).contains("and TRANSFORMERS_OFFLINE forbids to download it"), "{}", refused(&hub));
        hub.offline = Some("HF_HUB_OFFLINE");
        let snapshot = cache.path().join("models--Org--owl/snapshots/beef");
        let find = |name: &str| find_adapter(Path::new(name), &hub).map_err(|error| error.to_string());
        let missing = find("Org/owl").unwrap_err();
        assert!(missing.starts_with("Org/owl: there is no such folder, and it is not in the hub cache "), "{missing}");
        assert!(
            missing.contains("HF_HUB_OFFLINE forbids to download it") && missing.ends_with(ADAPTER_HINT),
            "{missing}"
        );
        for folder in ["", "checkpoint-2"] {
            fs::create_dir_all(snapshot.join(folder)).unwrap();
            for file in ADAPTER {
                fs::write(snapshot.join(folder).join(file), "{}").unwrap();
            }
        }
        assert_eq!(find("Org/owl").unwrap(), snapshot);
        assert_eq!(find("Org/owl@beef:checkpoint-2").unwrap(), snapshot.join("checkpoint-2"));
        fs::write(snapshot.join(ADAPTER[1]), "../../blobs/b1").unwrap();
        let text = find("Org/owl").unwrap_err();
        assert!(text.contains("adapter_model.safetensors: it holds the path of another file"), "{text}");
        fs::remove_file(snapshot.join(ADAPTER[0])).unwrap();
        let elsewhere = find("Org/owl").unwrap_err();
        assert!(elsewhere.contains("lacks adapter_config.json (there is Org/owl:checkpoint-2)"), "{elsewhere}");

        // A folder is returned as it is. A file is refused, and the message names its folder. Other paths are left to
        // the reader.
        let folder = snapshot.join("checkpoint-2");
        assert_eq!(find(folder.to_str().unwrap()).unwrap(), folder);
        let file = find(folder.join(ADAPTER[1]).to_str().unwrap()).unwrap_err();
        assert!(
            file.ends_with(&format!("it is a file, expected an adapter's folder; hint: give {}", folder.display())),
            "{file}"
        );
        assert_eq!(find("no/such/adapter").unwrap(), Path::new("no/such/adapter"));
        fs::write(folder.join(CONFIG), "{}").unwrap();
        assert_eq!(find(folder.to_str().unwrap()).unwrap(), folder, "a base's configuration beside it changes nothing");
        fs::remove_file(folder.join(ADAPTER[0])).unwrap();
        let model = find(folder.to_str().unwrap()).unwrap_err();
        assert!(
            model.ends_with(&format!("it is a model, not an adapter; hint: --model {}", folder.display())),
            "{model}"
        );
    }
}
