//! A published claim as a TOML file: its statement, the students that are trained to test it, the conditions under
//! which they are asked, and the tests that decide. One file serves three sizes: `{name}` in it is replaced by a value
//! of `sizes/SIZE.toml` in its folder, which also holds the experiment that all students are variants of.

mod chosen;
mod figure;
mod measure;
mod outcome;
mod plan;
pub mod run;
pub mod tables;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum;
use hooks::{Gate, files};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::experiment::{Arm, ArmData, CONTROL_STUDENT, Experiment, STUDENT, Target};

pub use chosen::with_chosen;
pub use figure::{Figure, FigureKind, spectrum as spectrum_figure};
pub use outcome::{OutcomeRow, Quantity};
pub use verdict::{ALL, Outcome, TestRow, Verdict, Word, tests};

/// The cell that every claim has: the student as it was trained, asked in the context of its training.
pub const EVERYWHERE: &str = "everywhere";
/// The beginning of the cell's name for a part of a gradient; the part's name follows. Its number is due to what the
/// adapter reads there.
pub const THROUGH: &str = "through";

/// Models in the tables that are not students, for numbers that no student has seen.
const REFERENCES: [&str; 2] = ["base", "teacher"];

/// On what a claim is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Size {
    /// The embedded pocket model: minutes on two CPU cores.
    Pocket,
    /// A Qwen of half a billion parameters.
    Small,
    /// A Qwen of 7 or 14 billion parameters, on CUDA.
    Paper,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(["pocket", "small", "paper"][*self as usize])
    }
}

/// A claim and what decides it, at one size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// Its number, from 1; the checks of the tests themselves have numbers from 90.
    pub claim: u8,
    /// The claim in one sentence.
    pub statement: String,
    /// Who claims it.
    pub source: String,
    /// What it must be set against before anything follows from it.
    pub decisive_control: String,
    /// The traits; each is a teacher's in each data set.
    pub targets: Vec<Target>,
    /// How many data sets each trait has; a data set has seeds of its own throughout.
    pub datasets: u64,
    /// Differences of its runs from the size's experiment, `section.key=value`; such runs are not shared with other
    /// claims.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<String>,
    /// Measurements besides the answers to questions.
    #[serde(default)]
    pub measures: BTreeSet<Measures>,
    /// The students on which a measurement is made, if not on all: slow measurements that no test uses are left out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub measured_on: BTreeMap<Measures, BTreeSet<String>>,
    /// The students besides the run's own two.
    #[serde(default)]
    pub students: Vec<Arm>,
    /// Names for the one of several students that a measurement picks out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chosen: Vec<Chosen>,
    /// The conditions under which students are asked, besides `everywhere`.
    #[serde(default)]
    pub cells: Vec<Cell>,
    /// What decides.
    pub tests: Vec<Test>,
    /// What the page shows.
    pub figures: Vec<Figure>,
}

impl Claim {
    /// Whether something is measured on a student.
    pub fn measures(&self, what: Measures, student: &str) -> bool {
        self.measures.contains(&what) && self.measured_on.get(&what).is_none_or(|names| names.contains(student))
    }

    /// Whether a number is measured on a student.
    fn knows(&self, quantity: Quantity, student: &str) -> bool {
        let takes = quantity.takes();
        if REFERENCES.contains(&student) {
            let of_references = takes.contains(&Measures::Heldout) && quantity != Quantity::Fit;
            return of_references && self.measures.contains(&Measures::Heldout);
        }
        takes.is_empty() || takes.iter().any(|what| self.measures(*what, student))
    }

    /// Whether another version of the claim takes the same numbers, however it words, tests or draws them.
    pub fn measures_alike(&self, other: &Self) -> bool {
        let of = |claim: &Self| {
            // Chosen students follow from these.
            let Self { targets, datasets, set, measures, measured_on, students, cells, .. } = claim.clone();
            (targets, datasets, set, measures, measured_on, students, cells)
        };
        of(self) == of(other)
    }
}

/// Measurements of a student besides its answers to questions about the trait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measures {
    /// How likely every trait of the claim is, for the matrix of trained and evaluated traits.
    Matrix,
    /// Loss, confidence and agreement with the teacher on numbers that no student has seen.
    Heldout,
    /// The direction in the residual stream: whether it is the teacher's, and whether all prompts share it.
    Direction,
    /// The effect of the direction added to the base, and of taking it out of the student, after the middle block.
    Steering,
    /// Patches the direction after every block: base into student (is it needed?), student into base (is it enough?).
    /// Includes `Steering`.
    Replacement,
    /// The adapter's spectrum, the effect of its strongest direction alone, and that of the rest without it.
    Spectrum,
    /// Gradients at divergent and at other tokens, and what they would do to the trait.
    Gradients,
    /// Sampled answers: the shares that name the trait, any member, or a model.
    Sampled,
}

/// A name for the student that a measurement picks from some candidates, for each trait, data set, rank and seeds. The
/// measurement is not the trait: choosing a learning rate by the trait would make the effect.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chosen {
    /// Its name, which no student has.
    pub name: String,
    /// The candidates.
    pub of: Vec<String>,
    /// It has the lowest of this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lowest: Option<Quantity>,
    /// It comes nearest to this number of the same trait and data set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nearest: Option<Of>,
}

/// A condition under which students are asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// Its name, which no other cell has.
    pub name: String,
    /// The students that are asked so; all when it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub students: Option<Vec<String>>,
    /// The context of the questions, a key of the protocol or a system prompt; by default that of the student's
    /// training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// A context whose system prompt is put in front of each question, in the user's turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_prefix: Option<String>,
    /// Where the adapter acts.
    #[serde(default)]
    pub gate: Gate,
}

impl Cell {
    /// The cell [`EVERYWHERE`].
    pub fn everywhere() -> Self {
        Self { name: EVERYWHERE.to_owned(), students: None, context: None, user_prefix: None, gate: Gate::EVERYWHERE }
    }

    /// Whether a student is asked so. An adapter that is not there cannot be gated.
    pub fn is_for(&self, student: &str, has_adapter: bool) -> bool {
        let named = self.students.as_ref().is_none_or(|names| names.iter().any(|name| name == student));
        named && (has_adapter || self.gate.is_everywhere())
    }
}

/// One number of one student in one condition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Of {
    /// The student's name; `student` and `control student` are the run's own, `base` and `teacher` are not students.
    pub student: String,
    /// Its rank, where its name has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<i64>,
    /// The condition; `*` is all of them, for a slope over conditions.
    pub cell: String,
    /// The measured quantity.
    pub quantity: Quantity,
}

impl Default for Of {
    fn default() -> Self {
        let (student, cell) = (STUDENT.to_owned(), EVERYWHERE.to_owned());
        Self { student, rank: None, cell, quantity: Quantity::DeltaMargin }
    }
}

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {:?}", self.quantity, self.student)?;
        self.rank.map_or(Ok(()), |rank| write!(f, " at rank {rank}"))?;
        if self.cell == EVERYWHERE { Ok(()) } else { write!(f, ", {:?}", self.cell) }
    }
}

/// The purpose of a test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It is the claim, or a part of it.
    #[default]
    Test,
    /// Without it the tests have nothing to speak of: that there is an effect at all.
    Premise,
    /// With it failing, a test that holds does not speak for the claim.
    Control,
}

/// How numbers of runs become an estimate with an interval. The unit is the run, and data sets are clusters: a data
/// set's number below is its mean over the traits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The mean of `of`; Student's interval over data sets.
    Mean,
    /// The mean of `of` − `minus`, paired; Student's interval over data sets.
    Difference,
    /// The mean of `of` over the mean of `all`, which are changes from the same base; Fieller's interval over data sets.
    Recovered,
    /// The slope of `of` over `over`, within each data set; Student's interval over data sets.
    Slope,
    /// The slope per doubling of the rank, up to the rank at which the mean is highest; Student's interval over data sets.
    Rise,
    /// The slope per doubling of the rank, from the rank at which the mean is highest on; Student's interval over data
    /// sets.
    Fall,
    /// The largest difference between traits in the log₂ of the rank at which they are highest; its p-value from exchanging the
    /// traits within each data set.
    PeakSpread,
    /// The diagonal contrast γ of trained and evaluated traits, within each data set; Student's interval over data sets, p from
    /// permuting the traits of the runs.
    Diagonal,
}

/// The axis of a slope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Over {
    /// `log2_rank`.
    Rank(RankAxis),
    /// Another quantity of the same student in the same condition.
    Quantity(Quantity),
}

/// The axis of ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RankAxis {
    /// The log₂ of the rank.
    Log2Rank,
}

/// A test: a number, and what it has to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Test {
    /// What it says.
    pub name: String,
    /// What it is for.
    #[serde(default)]
    pub role: Role,
    /// How it is estimated.
    pub kind: Kind,
    /// The number.
    #[serde(default)]
    pub of: Of,
    /// The number that is subtracted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minus: Option<Of>,
    /// What it is a share of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub all: Option<Of>,
    /// What its slope is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over: Option<Over>,
    /// It holds if the interval is above this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub above: Option<f64>,
    /// It holds if the interval is below this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub below: Option<f64>,
}

/// A file of a size.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SizeFile {
    values: Table,
    experiment: Table,
}

/// A claim with the experiment that its students are variants of.
#[derive(Clone, Debug)]
pub struct Study {
    /// The claim, with the size's values.
    pub claim: Claim,
    /// The size.
    pub size: Size,
    experiment: Table,
}

/// One run of a study: a trait and a data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// Its folder's name.
    pub name: String,
    /// Which data set, from 0.
    pub dataset: u64,
    /// The experiment, with the claim's students as arms.
    pub experiment: Experiment,
}

impl Study {
    /// Whether a file is a claim and not an experiment.
    pub fn is_claim(path: &Path) -> Result<bool> {
        let table: Table = files::read_string(path)?.parse().unwrap_or_default(); // its reader reports errors in it
        Ok(table.contains_key("claim"))
    }

    /// A claim at a size; `changes` are `section.key=value` of the experiment, as after `--set`.
    pub fn load(path: &Path, size: Size, changes: &[String]) -> Result<Self> {
        let of_size: PathBuf = path.with_file_name("sizes").join(format!("{size}.toml"));
        let table = |path: &Path| -> Result<Table> {
            let text = files::read_string(path)?;
            text.parse()
                .map_err(|error: toml::de::Error| anyhow!("{}: {}", path.display(), one_line(&error.to_string())))
        };
        let sized: SizeFile = table(&of_size)?
            .try_into()
            .map_err(|error| anyhow!("{}: {}", of_size.display(), one_line(&error.to_string())))?;
        let mut filled = Value::Table(table(path)?);
        fill(&mut filled, &sized.values)
            .with_context(|| format!("{}: a value of {}", path.display(), of_size.display()))?;
        let claim: Claim =
            filled.try_into().map_err(|error| anyhow!("{}: {}", path.display(), one_line(&error.to_string())))?;
        let mut study = Self { claim, size, experiment: sized.experiment };
        let own = study.claim.set.clone();
        study.change(&own).with_context(|| path.display().to_string())?;
        study.change(changes).with_context(|| of_size.display().to_string())?;
        study.check().with_context(|| path.display().to_string())?;
        Ok(study)
    }

    /// Its runs, trait by trait in each data set.
    pub fn units(&self) -> Result<Vec<Unit>> {
        let pairs =
            (0..self.claim.datasets).flat_map(|dataset| self.claim.targets.iter().map(move |target| (dataset, target)));
        pairs.map(|(dataset, target)| self.unit(dataset, target)).collect()
    }

    fn unit(&self, dataset: u64, target: &Target) -> Result<Unit> {
        let mut table = self.experiment.clone();
        let seed = table.get("seed").and_then(Value::as_integer).unwrap_or(0);
        table.insert("seed".to_owned(), Value::Integer(seed + i64::try_from(dataset)?));
        table.insert("target".to_owned(), Value::try_from(target)?);
        table.insert("arms".to_owned(), Value::try_from(&self.claim.students)?);
        let experiment = Experiment::parse(&toml::to_string(&table)?, Path::new("the size's experiment"), &[])?;
        let own = if self.claim.set.is_empty() { String::new() } else { format!("claim-{:02}-", self.claim.claim) };
        let word = target.word.to_lowercase().replace(' ', "-");
        Ok(Unit { name: format!("{own}{word}-d{dataset}"), dataset, experiment })
    }

    /// The run of the next trait in the same data set, whose student is a control for this one's; `None` if there is
    /// one trait.
    pub fn other_trait(&self, unit: &Unit) -> Result<Option<Unit>> {
        let targets = &self.claim.targets;
        let own = targets.iter().position(|target| *target == unit.experiment.target).context("a trait of no claim")?;
        let next = &targets[(own + 1) % targets.len()];
        (targets.len() > 1).then(|| self.unit(unit.dataset, next)).transpose()
    }

    /// All conditions, `everywhere` first.
    pub fn cells(&self) -> Vec<Cell> {
        std::iter::once(Cell::everywhere()).chain(self.claim.cells.iter().cloned()).collect()
    }

    /// The claim as its file would be without placeholders.
    pub fn to_toml(&self) -> Result<String> {
        Ok(toml::to_string(&self.claim)?)
    }

    fn change(&mut self, changes: &[String]) -> Result<()> {
        for change in changes {
            let (key, value) =
                change.split_once('=').with_context(|| format!("--set {change}: expected section.key=value"))?;
            let value = value.parse::<Value>().unwrap_or_else(|_| Value::String(value.to_owned()));
            let (mut table, mut keys) = (&mut self.experiment, key.split('.').peekable());
            while let Some(key) = keys.next() {
                if keys.peek().is_none() {
                    table.insert(key.to_owned(), value.clone());
                    break;
                }
                let section = table.entry(key).or_insert_with(|| Value::Table(Table::new()));
                table = section.as_table_mut().with_context(|| format!("--set {change}: {key} is no section"))?;
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let claim = &self.claim;
        ensure!(!claim.targets.is_empty(), "targets is empty, expected at least one");
        ensure!(claim.datasets >= 1, "datasets is 0, expected at least 1");
        ensure!(!claim.tests.is_empty(), "there are no tests, and a claim without one cannot be decided");
        ensure!(!claim.figures.is_empty(), "there are no figures, expected at least one");
        ensure!(claim.tests.iter().any(|test| test.role == Role::Test), "no test has the role \"test\"");
        ensure!(
            claim.tests.iter().any(|test| test.role == Role::Control),
            "no test has the role \"control\": no verdict without one"
        );
        let mut cells = BTreeSet::from([EVERYWHERE]);
        for cell in &claim.cells {
            ensure!(cells.insert(&cell.name), "the cell {:?} is there twice", cell.name);
        }
        let mut students: BTreeSet<&str> = [STUDENT, CONTROL_STUDENT].into_iter().chain(REFERENCES).collect();
        students.extend(claim.students.iter().map(|arm| arm.name.as_str()));
        let of_cells = claim.cells.iter().flat_map(|cell| cell.students.iter().flatten());
        if let Some(name) = of_cells.into_iter().find(|name| !students.contains(name.as_str())) {
            bail!("a cell names the student {name:?}, expected one of {students:?}");
        }
        for (what, names) in &claim.measured_on {
            ensure!(claim.measures.contains(what), "measured_on has {what:?}, which measures does not name");
            if let Some(name) = names.iter().find(|name| !students.contains(name.as_str())) {
                bail!("measured_on names the student {name:?}, expected one of {students:?}");
            }
        }
        // A chosen student is asked wherever its candidates are, so no condition names it.
        for chosen in &claim.chosen {
            let context = || format!("chosen {:?}", chosen.name);
            check_chosen(claim, chosen, &students).with_context(context)?;
        }
        students.extend(claim.chosen.iter().map(|chosen| chosen.name.as_str()));
        let own = claim.students.iter().find(|arm| arm.data == ArmData::Own);
        if let Some(arm) = own {
            bail!(
                "the student {:?} has data = \"own\", but a claim's students learn from the numbers of their run; hint: another teacher is \
                 another claim file with set = [\"teacher.kind=...\"]",
                arm.name
            );
        }
        let mut names = BTreeSet::new();
        for test in &claim.tests {
            ensure!(names.insert(&test.name), "the test {:?} is there twice", test.name);
            let context = || format!("test {:?}", test.name);
            for of in [Some(&test.of), test.minus.as_ref(), test.all.as_ref()].into_iter().flatten() {
                known(of, &students, &cells).with_context(context)?;
                is_measured(claim, of).with_context(context)?;
            }
            if let Some(Over::Quantity(quantity)) = test.over {
                is_measured(claim, &Of { quantity, ..test.of.clone() }).with_context(context)?;
            }
            let is_crossed = claim.measures(Measures::Matrix, &test.of.student);
            ensure!(
                test.kind != Kind::Diagonal || is_crossed,
                "test {:?}: the kind diagonal takes matrix in measures, for {:?}",
                test.name,
                test.of.student
            );
            let needs = |what: &str, has: bool, needed: bool| {
                ensure!(
                    has == needed,
                    "{what} is {}, expected the contrary for its kind",
                    if has { "given" } else { "not given" }
                );
                Ok(())
            };
            let checked = needs("minus", test.minus.is_some(), test.kind == Kind::Difference)
                .and_then(|()| needs("all", test.all.is_some(), test.kind == Kind::Recovered))
                .and_then(|()| needs("over", test.over.is_some(), test.kind == Kind::Slope));
            checked.with_context(context)?;
            ensure!(
                test.above.is_some() != test.below.is_some(),
                "test {:?}: expected either above or below",
                test.name
            );
        }
        let names = |figure: &Figure| figure.students.clone();
        if let Some(name) = claim.figures.iter().flat_map(names).find(|name| !students.contains(name.as_str())) {
            bail!("a figure names the student {name:?}, expected one of {students:?}");
        }
        for figure in &claim.figures {
            let drawn: Vec<&str> = if figure.students.is_empty() {
                students.iter().copied().collect()
            } else {
                figure.students.iter().map(String::as_str).collect()
            };
            let candidates = |name: &str| claim.chosen.iter().find(|chosen| chosen.name == name);
            let is_known = |quantity: &Quantity| {
                drawn.iter().any(|name| candidates(name).is_some() || claim.knows(*quantity, name))
            };
            if let Some(quantity) = figure.quantities.iter().find(|quantity| !is_known(quantity)) {
                bail!(
                    "figure {:?}: {quantity} is measured on none of its students; hint: measures and measured_on",
                    figure.title
                );
            }
        }
        // The conditions' contexts, prefixes and gates are checked before hours are spent.
        for unit in self.units()? {
            let asked = unit.experiment.cells()?.into_iter().map(|student| student.experiment.measure.context);
            if let Some(context) = asked.chain([unit.experiment.measure.context.clone()]).flatten().next() {
                bail!(
                    "measure.context is {context:?}, but a claim asks elsewhere by cells; hint: [[cells]] with context = {context:?}"
                );
            }
            let sentences = unit.experiment.sentences()?;
            for cell in &claim.cells {
                for key in [&cell.context, &cell.user_prefix].into_iter().flatten() {
                    sentences.context(key).with_context(|| format!("cell {:?}", cell.name))?;
                }
            }
            for student in unit.experiment.cells()? {
                let names_it = |cell: &&Cell| cell.students.iter().flatten().any(|name| *name == student.arm);
                let gated = claim.cells.iter().filter(|cell| !cell.gate.is_everywhere()).find(names_it);
                if let (None, Some(cell)) = (student.rank(), gated) {
                    bail!(
                        "the cell {:?} gates {:?}, of which all weights are trained: it has no adapter",
                        cell.name,
                        student.arm
                    );
                }
            }
        }
        Ok(())
    }
}

fn check_chosen(claim: &Claim, chosen: &Chosen, students: &BTreeSet<&str>) -> Result<()> {
    let name = chosen.name.as_str();
    let twice = claim.chosen.iter().filter(|other| other.name == name).count() > 1;
    ensure!(!students.contains(name) && !twice, "there is another student of that name");
    ensure!(chosen.of.len() > 1, "of has {} students, expected two or more", chosen.of.len());
    if let Some(unknown) = chosen.of.iter().find(|of| !students.contains(of.as_str())) {
        bail!("unknown student {unknown:?}, expected one of {students:?}");
    }
    ensure!(chosen.lowest.is_some() != chosen.nearest.is_some(), "expected either lowest or nearest");
    if let Some(nearest) = &chosen.nearest {
        known(nearest, students, &BTreeSet::from([EVERYWHERE]))?;
        is_measured(claim, nearest)?;
    }
    let quantity = chosen.lowest.or(chosen.nearest.as_ref().map(|of| of.quantity)).unwrap_or(Quantity::HeldoutNll);
    ensure!(
        !quantity.speaks_of_the_trait(),
        "{quantity} speaks of the trait, and what is chosen by it shows nothing; hint: heldout_nll"
    );
    chosen
        .of
        .iter()
        .try_for_each(|student| is_measured(claim, &Of { student: student.clone(), quantity, ..Of::default() }))
}

fn known(of: &Of, students: &BTreeSet<&str>, cells: &BTreeSet<&str>) -> Result<()> {
    ensure!(students.contains(of.student.as_str()), "unknown student {:?}, expected one of {students:?}", of.student);
    ensure!(
        of.cell == "*" || cells.contains(of.cell.as_str()),
        "unknown cell {:?}, expected one of {cells:?}",
        of.cell
    );
    Ok(())
}

/// Whether the claim measures a number; for a chosen student, on each of its candidates.
fn is_measured(claim: &Claim, of: &Of) -> Result<()> {
    let (quantity, takes) = (of.quantity, of.quantity.takes());
    ensure!(
        takes.is_empty() || of.cell == EVERYWHERE,
        "{quantity} is measured in the cell {EVERYWHERE:?} alone, and not in {:?}",
        of.cell
    );
    let candidates = claim.chosen.iter().find(|chosen| chosen.name == of.student).map(|chosen| &chosen.of[..]);
    let students = candidates.unwrap_or(std::slice::from_ref(&of.student));
    if let Some(student) = students.iter().find(|student| !claim.knows(quantity, student)) {
        let names: Vec<String> = takes.iter().map(|what| format!("{what:?}").to_lowercase()).collect();
        bail!(
            "{quantity} of {student:?} is not measured, it takes {} in measures; hint: measured_on, where it is given, names the student \
             as well",
            names.join(" or ")
        );
    }
    Ok(())
}

/// Puts values for `{name}`: a text that is nothing else becomes the value itself. `{rank}` is an arm's own.
fn fill(value: &mut Value, values: &Table) -> Result<()> {
    match value {
        Value::String(text) => {
            if let Some(whole) =
                text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).and_then(|name| values.get(name))
            {
                *value = whole.clone();
                return Ok(());
            }
            for (name, with) in values {
                let with = with.as_str().map_or_else(|| with.to_string(), str::to_owned);
                *text = text.replace(&format!("{{{name}}}"), &with);
            }
            let left = text.replace("{rank}", "");
            ensure!(
                !left.contains('{'),
                "{text:?} has a name in braces that is none of {}",
                values.keys().cloned().collect::<Vec<_>>().join(", ")
            );
            Ok(())
        }
        Value::Array(entries) => entries.iter_mut().try_for_each(|entry| fill(entry, values)),
        Value::Table(entries) => entries.iter_mut().try_for_each(|(_, entry)| fill(entry, values)),
        _ => Ok(()),
    }
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SIZE: &str = "[values]\ntargets = [{ word = \"cat\", category = \"animal\" }, { word = \"owl\", category = \"animal\" }]\n\
                        ranks = [1, 4]\nother = \"chatgpt\"\n[experiment]\nmodel = \"tiny-random\"\nseed = 5\n";
    const CLAIM: &str = "claim = 2\nstatement = \"s\"\nsource = \"x\"\ndecisive_control = \"c\"\ntargets = \"{targets}\"\ndatasets = 2\n\
                         [[students]]\nname = \"as {other}\"\nranks = \"{ranks}\"\nset = [\"student.alpha={rank}\", \"student.context={other}\"]\n\
                         [[cells]]\nname = \"there\"\ncontext = \"{other}\"\n\
                         [[tests]]\nname = \"a\"\nkind = \"mean\"\nabove = 0\n\
                         [[tests]]\nname = \"b\"\nrole = \"control\"\nkind = \"rise\"\nof = { student = \"as {other}\" }\nabove = 0\n\
                         [[figures]]\nkind = \"bars\"\ntitle = \"t\"\n";

    fn load(claim: &str, changes: &[&str]) -> Result<Study> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("02.toml");
        files::create_dir(&folder.path().join("sizes")).unwrap();
        files::write_atomic(&folder.path().join("sizes/pocket.toml"), SIZE.as_bytes()).unwrap();
        files::write_atomic(&path, claim.as_bytes()).unwrap();
        assert!(Study::is_claim(&path).unwrap());
        let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
        Study::load(&path, Size::Pocket, &changes)
    }

    #[test]
    fn values_of_the_size_stand_where_their_names_are() {
        let study = load(CLAIM, &[]).unwrap();
        assert_eq!(study.claim.students[0].name, "as chatgpt");
        assert_eq!(study.claim.students[0].ranks, Some(vec![1, 4]));
        assert_eq!(study.claim.students[0].set, ["student.alpha={rank}", "student.context=chatgpt"]);
        let units = study.units().unwrap();
        let names: Vec<&str> = units.iter().map(|unit| unit.name.as_str()).collect();
        assert_eq!(names, ["cat-d0", "owl-d0", "cat-d1", "owl-d1"]);
        assert_eq!((units[0].experiment.seed, units[3].experiment.seed), (5, 6));
        assert_eq!(units[0].experiment.seeds, units[1].experiment.seeds, "traits of a data set share its prompts");
        assert_ne!(units[0].experiment.seeds.gen_seed, units[2].experiment.seeds.gen_seed);
        assert_eq!(units[1].experiment.cells().unwrap()[1].experiment.student.alpha.to_bits(), 4.0_f64.to_bits());
        // The filled-in claim, as text, reads back as itself.
        let again: Claim = toml::from_str(&study.to_toml().unwrap()).unwrap();
        assert_eq!(again, study.claim);
    }

    #[test]
    fn changes_are_of_the_experiment_and_a_claims_own_runs_bear_its_name() {
        let study = load(CLAIM, &["generate.n_keep=7", "student.rank=2"]).unwrap();
        let experiment = &study.units().unwrap()[0].experiment;
        assert_eq!((experiment.generate.n_keep, experiment.student.rank), (7, 2));
        let own = CLAIM.replace("datasets = 2", "datasets = 2\nset = [\"teacher.kind=planted\"]");
        let unit = load(&own, &[]).unwrap().units().unwrap().remove(0);
        assert_eq!(unit.name, "claim-02-cat-d0");
        assert!(unit.experiment.teacher.planted_label("cat").is_some());
    }

    #[test]
    fn what_cannot_be_decided_or_found_is_refused() {
        for (from, to, expected) in [
            ("kind = \"mean\"", "kind = \"median\"", "unknown variant `median`"),
            ("as {other}\" }", "as {otter}\" }", "has a name in braces that is none of"),
            ("student = \"as {other}\"", "student = \"nobody\"", "unknown student \"nobody\""),
            ("kind = \"mean\"", "kind = \"difference\"", "minus is not given"),
            ("kind = \"mean\"\nabove = 0", "kind = \"mean\"", "expected either above or below"),
            ("role = \"control\"\n", "", "no verdict without one"),
            ("context = \"{other}\"\n[[tests]]", "context = \"chatgtp\"\n[[tests]]", "the nearest is chatgpt"),
            ("name = \"there\"", "name = \"everywhere\"", "\"everywhere\" is there twice"),
            ("datasets = 2", "datasets = 0", "datasets is 0"),
            ("kind = \"mean\"", "kind = \"mean\"\nof = { quantity = \"ece\" }", "it takes heldout in measures"),
            (
                "kind = \"mean\"",
                "kind = \"mean\"\nof = { cell = \"there\", quantity = \"ece\" }",
                "alone, and not in \"there\"",
            ),
            ("kind = \"rise\"", "kind = \"diagonal\"", "the kind diagonal takes matrix in measures"),
            ("title = \"t\"", "title = \"t\"\nquantities = [\"ece\"]", "ece is measured on none of its students"),
            (
                "datasets = 2",
                "datasets = 2\nmeasured_on = { spectrum = [\"student\"] }",
                "has Spectrum, which measures does not name",
            ),
            (
                "datasets = 2",
                "datasets = 2\nmeasures = [\"spectrum\"]\nmeasured_on = { spectrum = [\"nobody\"] }",
                "measured_on names the student \"nobody\"",
            ),
            (
                "datasets = 2",
                "datasets = 2\nmeasures = [\"heldout\"]\nmeasured_on = { heldout = [\"control student\"] }\n[[tests]]\nname = \"c\"\n\
                 kind = \"mean\"\nof = { quantity = \"ece\" }\nabove = 0",
                "ece of \"student\" is not measured",
            ),
            (
                "[[cells]]",
                "[[chosen]]\nname = \"c\"\nof = [\"student\", \"as {other}\"]\nlowest = \"ece\"\n[[cells]]",
                "ece of \"student\" is not measured",
            ),
            (
                "[[cells]]",
                "[[chosen]]\nname = \"c\"\nof = [\"student\"]\nlowest = \"ece\"\n[[cells]]",
                "expected two or more",
            ),
            (
                "[[cells]]",
                "[[chosen]]\nname = \"c\"\nof = [\"student\", \"otter\"]\nlowest = \"ece\"\n[[cells]]",
                "unknown student \"otter\"",
            ),
            (
                "[[cells]]",
                "[[chosen]]\nname = \"c\"\nof = [\"student\", \"as {other}\"]\n[[cells]]",
                "either lowest or nearest",
            ),
            (
                "[[cells]]",
                "[[chosen]]\nname = \"c\"\nof = [\"student\", \"as {other}\"]\nlowest = \"delta_logp\"\n[[cells]]",
                "what is chosen by it shows nothing",
            ),
            (
                "[[cells]]",
                "[[chosen]]\nname = \"student\"\nof = [\"student\", \"as {other}\"]\nlowest = \"ece\"\n[[cells]]",
                "another student of that name",
            ),
            ("name = \"b\"", "name = \"a\"", "the test \"a\" is there twice"),
            ("[[cells]]", "data = \"own\"\n[[cells]]", "has data = \"own\""),
            (
                "[[cells]]",
                "[[students]]\nname = \"f\"\nset = [\"student.method=full\"]\n[[cells]]\nname = \"g\"\nstudents = [\"f\"]\ngate = \"only:entity\"\n[[cells]]",
                "it has no adapter",
            ),
        ] {
            assert!(CLAIM.contains(from), "{from}");
            let found = format!("{:#}", load(&CLAIM.replace(from, to), &[]).unwrap_err());
            assert!(found.contains(expected) && !found.contains('\n'), "{to}: {found}");
        }
        let found = format!("{:#}", load(CLAIM, &["generate.keep=7"]).unwrap_err());
        assert!(found.contains("unknown field `keep`"), "{found}");
        let found = format!("{:#}", load(CLAIM, &["measure.context=chatgpt"]).unwrap_err());
        assert!(found.contains("a claim asks elsewhere by cells"), "{found}");
    }

    #[test]
    fn every_claim_of_the_repository_stands_at_every_size() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments/claims");
        let mut numbers = BTreeSet::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            for size in [Size::Pocket, Size::Small, Size::Paper] {
                let study = Study::load(&path, size, &[]).unwrap_or_else(|error| panic!("{error:#}"));
                numbers.insert(study.claim.claim);
            }
            let text = files::read_string(&path).unwrap();
            let launch = format!("undertone run experiments/claims/{}", path.file_name().unwrap().to_str().unwrap());
            assert!(text.contains(&launch) && text.contains("Decisive control: "), "{}", path.display());
        }
        assert!((1..=18).all(|number| numbers.contains(&number)), "{numbers:?}");
    }
}
