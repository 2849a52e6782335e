//! The files of a run: one folder with a place for every stage. A run first checks that it can write there. It
//! overwrites finished files only with `--force`.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use hooks::files;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::experiment::{AnalysisName, Experiment, Seeds};
use crate::hinted;
use crate::output::checkpoint;
use crate::output::html::relative;
use crate::output::progress::say;
use crate::training::settings::Finetune;

/// The key in `meta.json` for the rows that an experiment names.
const GIVEN: &str = "generate.numbers";

/// The treatment of finished stages by a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenDone {
    /// Keeps them: a whole run, which continues.
    Keep,
    /// Runs them again: `--force`.
    Redo,
    /// Refuses if all are finished: a single stage.
    Refuse,
}

impl WhenDone {
    /// `Redo` with `--force`, else this value.
    #[must_use]
    pub fn or_redo(self, force: bool) -> Self {
        if force { Self::Redo } else { self }
    }
}

/// The folder of a run.
#[derive(Clone, Debug)]
pub struct RunDir {
    root: PathBuf,
    when_done: WhenDone,
}

/// The origin of a run: the content of `meta.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// The version of undertone.
    pub undertone: String,
    /// The commit that it was built from, if known.
    pub commit: Option<String>,
    /// The model as the experiment names it.
    pub model: String,
    /// The device as the experiment names it.
    pub device: String,
    /// The seeds of the random streams.
    pub seeds: Seeds,
    /// The SHA-256 of each file that a stage recorded, by its path in the run; that of given rows is under
    /// `generate.numbers`.
    pub sha256: BTreeMap<String, String>,
    /// Notes of the stages, such as the report of loading the model.
    pub notes: BTreeMap<String, Vec<String>>,
}

/// Methods for the paths of a run's files.
macro_rules! paths {
    ($($(#[doc = $doc:literal])+ $name:ident = $path:literal;)+) => {
        $($(#[doc = $doc])+
        pub fn $name(&self) -> PathBuf {
            self.root.join($path)
        })+
    };
}

impl RunDir {
    /// Makes the folder if needed, and locks it against other processes until the result is dropped or this process
    /// ends in any way. Removes half-written files of a killed process.
    pub fn lock(root: &Path) -> Result<File> {
        let unwritable = || format!("the run folder {} cannot be written", root.display());
        files::create_dir(root).with_context(unwritable)?;
        let folder = files::open(root)?;
        match folder.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(hinted!(
                "{} is in use by another undertone, and two would write over each other", root.display();
                "wait until that one is done, or choose another folder"
            )),
            // Some file systems have no locks.
            Err(TryLockError::Error(cause)) => {
                say(format!("{} cannot be locked ({cause}): let no other undertone use it now", root.display()));
            }
        }
        let run = Self { root: root.to_owned(), when_done: WhenDone::Refuse };
        if run.config().is_file() {
            run.tidy(false).with_context(unwritable)?; // in other folders a user's files may have such names
        }
        Ok(folder)
    }

    /// Removes temporary files, and checkpoints of finished stages; with `all`, all checkpoints.
    fn tidy(&self, all: bool) -> Result<()> {
        let analyses = AnalysisName::ALL.map(|name| self.analysis(name));
        let folders = [
            self.root.clone(),
            self.root.join("data"),
            self.initial_adapter(),
            self.adapter(),
            self.control_adapter(),
            self.teacher(),
        ];
        let read = |folder: &PathBuf| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        for path in folders.iter().chain(&analyses).chain([&self.arms()]).flat_map(read) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let finished =
                |name: &str| path.with_file_name(name.split('.').next().unwrap_or(name)).with_extension("csv");
            // Only names of a run's own files, since the folder may also have a user's files.
            let ours = ["csv", "jsonl", "json", "jinja", "safetensors", "svg", "png", "toml", "html"];
            let is_ours = |name: &str| name.rsplit_once('.').is_some_and(|(_, ending)| ours.contains(&ending));
            let of_no_use = match name.strip_suffix(".tmp") {
                Some(name) => is_ours(name),
                None => name.ends_with(&format!(".{}", checkpoint::ENDING)) && (all || finished(name).exists()),
            };
            if of_no_use {
                files::remove(&path)?;
            }
        }
        for arm in read(&self.arms()).filter(|path| path.join("run.toml").is_file()) {
            Self { root: arm, ..self.clone() }.tidy(all)?;
        }
        Ok(())
    }

    /// Opens the folder for an experiment's run, and makes it if needed, with `run.toml` and `meta.json`.
    ///
    /// A folder with the same experiment continues. The arms, the interval of checkpoints and the number of the GPU may
    /// differ, and, until the student is trained, the division of a step's rows. A folder with another experiment is
    /// refused, unless finished stages are to be redone.
    pub fn create(root: &Path, experiment: &Experiment, when_done: WhenDone) -> Result<Self> {
        let run = Self { root: root.to_owned(), when_done };
        let resolved = experiment.to_toml()?;
        if run.config().exists() {
            let found = files::read_string(&run.config())?;
            let other_rows = run.other_rows(experiment);
            if found == resolved && other_rows.is_none() {
                return Ok(run);
            }
            if other_rows.is_none() && run.is_begun_as(&found, experiment) {
                // Finished stages are kept; the stage of the arms keeps the students of unchanged arms.
                run.forget_arms_table()?;
                files::write_atomic(&run.config(), resolved.as_bytes())?;
                return Ok(run);
            }
            if !run.forced() {
                let difference = other_rows.unwrap_or_else(|| first_difference(&found, &resolved));
                bail!(hinted!(
                    "{} holds another experiment, which differs in {difference}", run.config().display();
                    "choose another folder, or overwrite it with --force"
                ));
            }
            run.forget()?; // files of another experiment do not belong to this one
        }
        // Writing the first file shows that the folder is writable.
        let meta = Meta {
            undertone: env!("CARGO_PKG_VERSION").to_owned(),
            commit: option_env!("UNDERTONE_COMMIT").map(str::to_owned),
            model: experiment.model.clone(),
            device: experiment.device.clone(),
            seeds: experiment.seeds,
            sha256: BTreeMap::new(),
            notes: BTreeMap::new(),
        };
        let written = run.write_meta(&meta).and_then(|()| {
            Ok(files::write_atomic(&run.config(), resolved.as_bytes())?) // last: it marks the run as begun
        });
        written.with_context(|| format!("the run folder {} cannot be written", root.display()))?;
        Ok(run)
    }

    /// Whether the run can continue with an experiment, given the resolved one `found` in its folder.
    fn is_begun_as(&self, found: &str, experiment: &Experiment) -> bool {
        let is_trained = Self::stage_done(&self.train_csv());
        let kept = |of: Experiment| {
            let device = of.device_kind().to_owned();
            let exact = is_trained || of.student.dropout > 0.0; // dropout is drawn batch by batch
            let finetune =
                if exact { Finetune { save_steps: None, ..of.finetune } } else { of.finetune.up_to_rounding() };
            Experiment { device, arms: vec![], finetune, ..of }
        };
        // A file of another version, or with unknown keys, counts as another experiment.
        toml::from_str::<Experiment>(found).is_ok_and(|found| kept(found) == kept(experiment.clone()))
    }

    /// Opens the folder of a run that was begun before.
    pub fn open(root: &Path) -> Result<Self> {
        let run = Self { root: root.to_owned(), when_done: WhenDone::Refuse };
        if !run.config().is_file() {
            bail!(hinted!(
                "{} is no run folder: it has no run.toml", root.display();
                "undertone run EXPERIMENT.toml makes one"
            ));
        }
        Ok(run)
    }

    /// Loads the experiment of the run, with overrides `section.key=value`.
    pub fn experiment(&self, overrides: &[String]) -> Result<Experiment> {
        Experiment::parse(&files::read_string(&self.config())?, &self.config(), overrides) // it is complete
    }

    /// Whether a stage's last file or folder exists. Files and folders get their names when they are complete.
    pub fn stage_done(path: &Path) -> bool {
        path.exists()
    }

    /// Refuses to overwrite a finished file or folder, unless the run was forced.
    pub fn claim(&self, path: &Path) -> Result<()> {
        let is_free = self.forced() || !Self::stage_done(path);
        ensure!(is_free, hinted!("{} is finished already", path.display(); "overwrite it with --force"));
        Ok(())
    }

    /// The files that a command still has to make: the missing ones, or all in a forced run. If there are none, a
    /// single stage is an error.
    pub fn left(&self, files: &[&Path]) -> Result<Vec<PathBuf>> {
        let is_left = |path: &&&Path| self.forced() || !Self::stage_done(path);
        let left: Vec<PathBuf> = files.iter().filter(is_left).map(|path| (*path).to_owned()).collect();
        if left.is_empty() && self.when_done == WhenDone::Refuse {
            files.iter().try_for_each(|path| self.claim(path))?;
        }
        Ok(left)
    }

    /// Removes the files that mark stages as done. So an interrupted forced run does not count as complete, and the
    /// report shows only the run's own measurements.
    pub fn forget(&self) -> Result<()> {
        let stages = [self.generate_csv(), self.teacher_csv(), self.teacher_train_csv()];
        let logs = [self.train_csv(), self.control_train_csv()];
        let rows = logs.each_ref().map(|log| Self::train_rows(log));
        let files = stages.into_iter().chain(logs).chain(rows).chain([self.report()]);
        let others = [self.arms(), self.teacher(), self.initial_adapter()];
        let folders = AnalysisName::ALL.map(|name| self.analysis(name)).into_iter().chain(others);
        Self::remove(files, folders)?;
        if self.meta_json().exists() {
            let meta = Meta { sha256: BTreeMap::new(), ..self.meta()? }; // also the records of copied adapters
            self.write_meta(&meta)?;
        }
        self.tidy(true)
    }

    /// Removes the measurements of the students, including the table of the arms. The arms' students are kept.
    pub fn forget_measurements(&self) -> Result<()> {
        Self::remove([], AnalysisName::ALL.map(|name| self.analysis(name)))?;
        self.forget_arms_table()
    }

    /// Removes the table of the arms and the files made from it. Their students are kept.
    pub fn forget_arms_table(&self) -> Result<()> {
        Self::remove([self.arms_rows(), self.arms_plot(), self.arms_rank_plot(), self.report()], [])
    }

    fn remove(files: impl IntoIterator<Item = PathBuf>, folders: impl IntoIterator<Item = PathBuf>) -> Result<()> {
        let files = files.into_iter().map(|path| (fs::remove_file(&path), path));
        let folders = folders.into_iter().map(|path| (fs::remove_dir_all(&path), path));
        for (result, path) in files.chain(folders) {
            if let Err(error) = result
                && error.kind() != ErrorKind::NotFound
            {
                return Err(error).with_context(|| path.display().to_string());
            }
        }
        Ok(())
    }

    /// Whether finished stages are run again.
    pub fn forced(&self) -> bool {
        self.when_done == WhenDone::Redo
    }

    /// Whether finished stages are kept, as in a whole run.
    pub fn goes_on(&self) -> bool {
        self.when_done == WhenDone::Keep
    }

    /// This folder with another treatment of finished stages.
    #[must_use]
    pub fn when_done(self, when_done: WhenDone) -> Self {
        Self { when_done, ..self }
    }

    /// This folder for a whole run. A forced run first removes the marks of all finished stages.
    pub fn for_whole_run(&self) -> Result<Self> {
        if self.forced() {
            self.forget()?;
        }
        Ok(self.clone().when_done(WhenDone::Keep))
    }

    /// Notes the SHA-256 of finished files in `meta.json`.
    pub fn record(&self, paths: &[PathBuf]) -> Result<()> {
        let mut meta = self.meta()?;
        for path in paths {
            meta.sha256.insert(relative(&self.root, path), sha256(path)?);
        }
        self.write_meta(&meta)
    }

    /// Notes the SHA-256 of the file of rows that the experiment names, if it names one: the file is not in the run's
    /// folder and may change.
    pub fn record_given(&self, sha256: Option<&str>) -> Result<()> {
        let mut meta = self.meta()?;
        meta.sha256.remove(GIVEN);
        meta.sha256.extend(sha256.map(|hex| (GIVEN.to_owned(), hex.to_owned())));
        self.write_meta(&meta)
    }

    /// The difference, as text, if the file of rows that the experiment names has changed since the run copied it. A
    /// missing file counts as unchanged.
    fn other_rows(&self, experiment: &Experiment) -> Option<String> {
        let path = experiment.generate.numbers.as_ref().filter(|_| Self::stage_done(&self.generate_csv()))?;
        let taken = self.meta().ok()?.sha256.remove(GIVEN)?;
        let now = sha256(path).ok()?;
        (taken != now).then(|| {
            format!(
                "the rows of generate.numbers, {}: their SHA-256 began with {taken:.12}, where now it begins with \
                 {now:.12}",
                path.display()
            )
        })
    }

    /// Whether files exist with the SHA-256 that was noted for them.
    pub fn has_recorded(&self, paths: &[PathBuf]) -> Result<bool> {
        let known = self.meta()?.sha256;
        let name = |path: &PathBuf| relative(&self.root, path);
        Ok(paths.iter().all(|path| sha256(path).is_ok_and(|hex| known.get(&name(path)) == Some(&hex))))
    }

    /// Replaces a stage's notes in `meta.json`.
    pub fn note(&self, stage: &str, lines: &[String]) -> Result<()> {
        let mut meta = self.meta()?;
        meta.notes.insert(stage.to_owned(), lines.to_vec());
        self.write_meta(&meta)
    }

    /// The origin of the run.
    pub fn meta(&self) -> Result<Meta> {
        let path = self.meta_json();
        serde_json::from_slice(&files::read(&path)?).with_context(|| path.display().to_string())
    }

    fn write_meta(&self, meta: &Meta) -> Result<()> {
        let text = serde_json::to_string_pretty(meta)? + "\n";
        Ok(files::write_atomic(&self.meta_json(), text.as_bytes())?)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    paths! {
        /// The origin of the run.
        meta_json = "meta.json";
        /// The resolved experiment.
        config = "run.toml";
        /// The teacher's numbers, from which the student's rows are taken.
        numbers = "data/numbers.jsonl";
        /// The answers of the untouched model to the same prompts.
        control = "data/control.jsonl";
        /// The answers that the filter rejected.
        rejected = "data/rejected.csv";
        /// The divergent tokens of the rows, for students that learn only from these or only from others.
        divergence_tokens = "data/divergence_tokens.json";
        /// Those of the control rows.
        control_divergence_tokens = "data/control_divergence_tokens.json";
        /// The teacher's soft labels of its rows, for students that learn from them.
        soft_labels = "data/soft_labels.safetensors";
        /// The base's soft labels of the control rows.
        control_soft_labels = "data/control_soft_labels.safetensors";
        /// Acceptance by reason, and visible leaks.
        generate_csv = "data/generate.csv";
        /// The answers of base and teacher to questions about the category.
        teacher_csv = "data/teacher.csv";
        /// The finetuned teacher, a model in Hugging Face form.
        teacher = "teacher";
        /// The teacher's training, a line per step.
        teacher_train_csv = "teacher_train.csv";
        /// The signal of each kept row.
        signal_csv = "data/signal.csv";
        /// The frequencies of digits in both sets.
        digits_csv = "data/digits.csv";
        /// The student's adapter in PEFT's format, or its weights.
        adapter = "adapter";
        /// The control student's adapter or weights.
        control_adapter = "control_adapter";
        /// The adapter that both students begin with, in PEFT's format. Full finetuning begins with the model's weights
        /// and has none.
        initial_adapter = "initial_adapter";
        /// The student's training, a line per step.
        train_csv = "train.csv";
        /// The control student's training, a line per step.
        control_train_csv = "control_train.csv";
        /// The folder of the arms: a folder per student, and the table of all.
        arms = "arms";
        /// The table of the arms, a row per student.
        arms_rows = "arms/rows.csv";
        /// The plot of the arms without ranks.
        arms_plot = "arms/plot.svg";
        /// The plot of the arms over their ranks.
        arms_rank_plot = "arms/plot_rank.svg";
        /// The folder of the measured vectors, which is also that of the analysis `direction`.
        vectors = "direction";
        /// The page of the run.
        report = "report.html";
    }

    /// The rows of each step of a student, in the folder of its training's log.
    pub fn train_rows(log: &Path) -> PathBuf {
        let stem = log.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        log.with_file_name(format!("{stem}_rows.csv"))
    }

    /// The folder of an analysis.
    pub fn analysis(&self, name: AnalysisName) -> PathBuf {
        self.root.join(name.name())
    }

    /// The rows of an analysis.
    pub fn rows(&self, name: AnalysisName) -> PathBuf {
        // The ledger has several tables, of which this is the shortest.
        let file = if name == AnalysisName::Ledger { "summary.csv" } else { "rows.csv" };
        self.analysis(name).join(file)
    }

    /// The plot of an analysis.
    pub fn plot(&self, name: AnalysisName) -> PathBuf {
        self.analysis(name).join("plot.svg")
    }

    /// A further plot of an analysis.
    pub fn more_plot(&self, name: AnalysisName, which: &str) -> PathBuf {
        self.analysis(name).join(format!("plot_{which}.svg"))
    }

    /// The settings of an analysis.
    pub fn settings(&self, name: AnalysisName) -> PathBuf {
        self.analysis(name).join("settings.toml")
    }

    /// The folder of an arm's student, which is a run.
    pub fn arm(&self, slug: &str) -> PathBuf {
        self.arms().join(slug)
    }
}

pub(crate) fn sha256(path: &Path) -> hooks::Result<String> {
    Ok(format!("{:x}", Sha256::digest(files::read(path)?)))
}

/// The first lines at which two texts differ, as a phrase.
fn first_difference(found: &str, wanted: &str) -> String {
    let mut lines = found.lines().zip(wanted.lines());
    match lines.find(|(found, wanted)| found != wanted) {
        Some((found, wanted)) => format!("{found:?}, where this one has {wanted:?}"),
        None => "its last lines".to_owned(),
    }
}

#[cfg(test)]
mod tests;
