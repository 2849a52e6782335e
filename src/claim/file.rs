//! A published claim as a TOML file: its statement, the students that are trained to test it, the conditions under
//! which they are asked, the tests that decide, and the figures. Such a file is also checked here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use hooks::Gate;
use serde::{Deserialize, Serialize};

use super::outcome::{Measurement, Quantity};
use crate::experiment::{Arm, ArmData, CONTROL_STUDENT, STUDENT, Target};
use crate::hinted;

/// The condition that every claim has: the student as it was trained, asked in the context of its training.
pub const EVERYWHERE: &str = "everywhere";
/// The first word of the name of a condition for a part of a gradient: the contribution of the adapter's inputs at the
/// part of the chat that follows.
pub const THROUGH: &str = "through";

/// Models in the tables that are not students: they are measured on held-out numbers.
const REFERENCES: [&str; 2] = ["base", "teacher"];

/// A claim at one size, with its students, conditions and tests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// Its number, from 1. The ledger's questions have numbers from 71, the study on a real Qwen 81, and checks of the tests
    /// themselves numbers from 90.
    pub claim: u8,
    /// The claim in one sentence.
    pub statement: String,
    /// The publication that makes the claim.
    pub source: String,
    /// The comparison that is needed before anything follows from the claim.
    pub decisive_control: String,
    /// The traits; each data set has a teacher for each trait.
    pub targets: Vec<Target>,
    /// Number of data sets of each trait. Data sets differ in all seeds.
    pub datasets: u64,
    /// Changes of its runs from the size's experiment, `section.key=value`. Such runs are not shared with other claims.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<String>,
    /// The measurements other than the answers to questions.
    #[serde(default)]
    pub measures: BTreeSet<Measurement>,
    /// The students on which a measurement is made, if not all: a slow measurement may be limited to those that a test
    /// needs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub measured_on: BTreeMap<Measurement, BTreeSet<String>>,
    /// The students other than the run's own two.
    #[serde(default)]
    pub students: Vec<Arm>,
    /// Students that a measurement selects from several candidates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chosen: Vec<Chosen>,
    /// The conditions under which students are asked, besides `everywhere`.
    #[serde(default)]
    pub cells: Vec<EvalCondition>,
    /// The tests that decide the claim.
    pub tests: Vec<Test>,
    /// The figures of the page.
    pub figures: Vec<Figure>,
}

impl Claim {
    /// Whether a measurement is made on a student.
    pub fn measures(&self, what: Measurement, student: &str) -> bool {
        self.measures.contains(&what) && self.measured_on.get(&what).is_none_or(|names| names.contains(student))
    }

    /// Whether a number is measured on a student.
    fn knows(&self, quantity: Quantity, student: &str) -> bool {
        let takes = quantity.takes();
        if REFERENCES.contains(&student) {
            let of_references = takes.contains(&Measurement::Heldout) && quantity != Quantity::Fit;
            return of_references && self.measures.contains(&Measurement::Heldout);
        }
        takes.is_empty() || takes.iter().any(|what| self.measures(*what, student))
    }

    /// Refuses unknown names, numbers that are not measured, and a claim that cannot be decided.
    pub(super) fn check(&self) -> Result<()> {
        ensure!(!self.targets.is_empty(), "targets is empty, expected at least one");
        ensure!(self.datasets >= 1, "datasets is 0, expected at least 1");
        ensure!(!self.tests.is_empty(), "there are no tests, and a claim without one cannot be decided");
        ensure!(!self.figures.is_empty(), "there are no figures, expected at least one");
        let has = |role: Role| self.tests.iter().any(|test| test.role == role);
        ensure!(has(Role::Test), "no test has the role \"test\"");
        ensure!(has(Role::Control), "no test has the role \"control\": no verdict without one");
        let mut cells = BTreeSet::from([EVERYWHERE]);
        for cell in &self.cells {
            ensure!(cells.insert(&cell.name), "the cell {:?} is there twice", cell.name);
        }
        let mut students: BTreeSet<&str> = [STUDENT, CONTROL_STUDENT].into_iter().chain(REFERENCES).collect();
        students.extend(self.students.iter().map(|arm| arm.name.as_str()));
        has_students("a cell", self.cells.iter().flat_map(|cell| cell.students.iter().flatten()), &students)?;
        for (what, names) in &self.measured_on {
            ensure!(self.measures.contains(what), "measured_on has {what:?}, which measures does not name");
            has_students("measured_on", names, &students)?;
        }
        // A chosen student has the conditions of its candidates, so no condition names it.
        for chosen in &self.chosen {
            self.check_chosen(chosen, &students).with_context(|| format!("chosen {:?}", chosen.name))?;
        }
        students.extend(self.chosen.iter().map(|chosen| chosen.name.as_str()));
        if let Some(arm) = self.students.iter().find(|arm| arm.data == ArmData::Own) {
            bail!(hinted!(
                "the student {:?} has data = \"own\", but a claim's students learn from the numbers of their run", arm.name;
                "another teacher is another claim file with set = [\"teacher.kind=...\"]"
            ));
        }
        let mut names = BTreeSet::new();
        for test in &self.tests {
            ensure!(names.insert(&test.name), "the test {:?} is there twice", test.name);
            self.check_test(test, &students, &cells).with_context(|| format!("test {:?}", test.name))?;
        }
        has_students("a figure", self.figures.iter().flat_map(|figure| &figure.students), &students)?;
        for figure in &self.figures {
            let is_drawn = |name: &str| figure.students.is_empty() || figure.students.iter().any(|of| of == name);
            let is_chosen = |name: &str| self.chosen.iter().any(|chosen| chosen.name == name);
            let knows = |quantity: Quantity, name: &str| is_chosen(name) || self.knows(quantity, name);
            let is_known = |quantity: &Quantity| students.iter().any(|name| is_drawn(name) && knows(*quantity, name));
            if let Some(quantity) = figure.quantities.iter().find(|quantity| !is_known(quantity)) {
                bail!(hinted!(
                    "figure {:?}: {quantity} is measured on none of its students", figure.title;
                    "measures and measured_on"
                ));
            }
        }
        Ok(())
    }

    fn check_test(&self, test: &Test, students: &BTreeSet<&str>, cells: &BTreeSet<&str>) -> Result<()> {
        for of in [Some(&test.of), test.minus.as_ref(), test.all.as_ref()].into_iter().flatten() {
            of.check_names(students, cells)?;
            self.check_measured(of)?;
        }
        if let Some(Over::Quantity(quantity)) = test.over {
            self.check_measured(&StudentNumber { quantity, ..test.of.clone() })?;
        }
        let student = &test.of.student;
        let is_crossed = test.kind != Kind::Diagonal || self.measures(Measurement::Matrix, student);
        ensure!(is_crossed, "the kind diagonal takes matrix in measures, for {student:?}");
        for (key, is_given, is_needed) in [
            ("minus", test.minus.is_some(), test.kind == Kind::Difference),
            ("all", test.all.is_some(), test.kind == Kind::Recovered),
            ("over", test.over.is_some(), test.kind == Kind::Slope),
        ] {
            let given = if is_given { "given" } else { "not given" };
            ensure!(is_given == is_needed, "{key} is {given}, expected the contrary for its kind");
        }
        ensure!(test.above.is_some() != test.below.is_some(), "expected either above or below");
        Ok(())
    }

    fn check_chosen(&self, chosen: &Chosen, students: &BTreeSet<&str>) -> Result<()> {
        let name = chosen.name.as_str();
        let twice = self.chosen.iter().filter(|other| other.name == name).count() > 1;
        ensure!(!students.contains(name) && !twice, "there is another student of that name");
        ensure!(chosen.of.len() > 1, "of has {} students, expected two or more", chosen.of.len());
        if let Some(unknown) = chosen.of.iter().find(|of| !students.contains(of.as_str())) {
            bail!("unknown student {unknown:?}, expected one of {students:?}");
        }
        ensure!(chosen.lowest.is_some() != chosen.nearest.is_some(), "expected either lowest or nearest");
        if let Some(nearest) = &chosen.nearest {
            nearest.check_names(students, &BTreeSet::from([EVERYWHERE]))?;
            self.check_measured(nearest)?;
        }
        let quantity = chosen.quantity().unwrap_or(Quantity::HeldoutNll);
        ensure!(
            !quantity.speaks_of_the_trait(),
            hinted!("{quantity} speaks of the trait, and what is chosen by it shows nothing"; "heldout_nll")
        );
        let of = |student: &String| StudentNumber { student: student.clone(), quantity, ..StudentNumber::default() };
        chosen.of.iter().try_for_each(|student| self.check_measured(&of(student)))
    }

    /// Refuses a number that the claim does not measure. That of a chosen student must be measured on each candidate.
    fn check_measured(&self, of: &StudentNumber) -> Result<()> {
        let (quantity, takes) = (of.quantity, of.quantity.takes());
        let is_booked = quantity.is_booked_in(&of.cell);
        ensure!(
            is_booked || !quantity.is_of_groups_alone(),
            "{quantity} is booked to groups of tokens, and not in the cell {:?}; hint: cell = \"at divergent_digit\"",
            of.cell
        );
        ensure!(
            takes.is_empty() || of.cell == EVERYWHERE || is_booked,
            "{quantity} is measured in the cell {EVERYWHERE:?} alone, and not in {:?}",
            of.cell
        );
        let candidates = self.chosen.iter().find(|chosen| chosen.name == of.student).map(|chosen| &chosen.of[..]);
        let students = candidates.unwrap_or(std::slice::from_ref(&of.student));
        if let Some(student) = students.iter().find(|student| !self.knows(quantity, student)) {
            let names: Vec<String> = takes.iter().map(|what| format!("{what:?}").to_lowercase()).collect();
            bail!(hinted!(
                "{quantity} of {student:?} is not measured, it takes {} in measures", names.join(" or ");
                "measured_on, where it is given, names the student as well"
            ));
        }
        Ok(())
    }

    /// Whether another version of the claim measures the same numbers. Its text, tests and figures may differ.
    pub fn measures_alike(&self, other: &Self) -> bool {
        let of = |claim: &Self| {
            // Chosen students depend only on these.
            let Self { targets, datasets, set, measures, measured_on, students, cells, .. } = claim.clone();
            (targets, datasets, set, measures, measured_on, students, cells)
        };
        of(self) == of(other)
    }
}

fn has_students<'a>(what: &str, names: impl IntoIterator<Item = &'a String>, students: &BTreeSet<&str>) -> Result<()> {
    match names.into_iter().find(|name| !students.contains(name.as_str())) {
        Some(name) => bail!("{what} names the student {name:?}, expected one of {students:?}"),
        None => Ok(()),
    }
}

/// A student that a measurement selects from candidates, for each trait, data set, rank and seeds. The measurement must
/// not be of the trait: a learning rate that is chosen by the trait would produce the effect.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chosen {
    /// Its name, which must differ from all students'.
    pub name: String,
    /// The candidates.
    pub of: Vec<String>,
    /// Selects the candidate with the lowest value of this quantity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lowest: Option<Quantity>,
    /// Selects the candidate whose value is nearest to this number, of the same trait and data set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nearest: Option<StudentNumber>,
}

impl Chosen {
    /// The quantity by which it is selected.
    pub(super) fn quantity(&self) -> Option<Quantity> {
        self.lowest.or(self.nearest.as_ref().map(|of| of.quantity))
    }
}

/// A condition under which students are asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalCondition {
    /// Its name, which must be unique.
    pub name: String,
    /// The students that are asked under it; all if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub students: Option<Vec<String>>,
    /// The context of the questions: a key of the protocol or a system prompt; by default the context of the student's
    /// training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// A context whose system prompt is put in front of each question, in the user's turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_prefix: Option<String>,
    /// The gate: where and how strongly the adapter acts.
    #[serde(default)]
    pub gate: Gate,
}

impl EvalCondition {
    /// The condition [`EVERYWHERE`].
    pub fn everywhere() -> Self {
        Self { name: EVERYWHERE.to_owned(), students: None, context: None, user_prefix: None, gate: Gate::EVERYWHERE }
    }

    /// Whether a student is asked under this condition. A student without an adapter cannot be gated.
    pub fn is_for(&self, student: &str, has_adapter: bool) -> bool {
        let named = self.students.as_ref().is_none_or(|names| names.iter().any(|name| name == student));
        named && (has_adapter || self.gate.is_everywhere())
    }
}

/// One number of one student in one condition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StudentNumber {
    /// The student's name; `student` and `control student` are the run's own, `base` and `teacher` are not students.
    pub student: String,
    /// Its rank, if students of this name have several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<i64>,
    /// The condition; `*` means all, for a slope over conditions.
    pub cell: String,
    /// The measured quantity.
    pub quantity: Quantity,
}

impl StudentNumber {
    fn check_names(&self, students: &BTreeSet<&str>, cells: &BTreeSet<&str>) -> Result<()> {
        let Self { student, cell, .. } = self;
        ensure!(students.contains(student.as_str()), "unknown student {student:?}, expected one of {students:?}");
        let is_known = cell == "*" || cells.contains(cell.as_str()) || self.quantity.is_booked_in(cell);
        ensure!(is_known, "unknown cell {cell:?}, expected one of {cells:?}");
        Ok(())
    }
}

impl Default for StudentNumber {
    fn default() -> Self {
        let (student, cell) = (STUDENT.to_owned(), EVERYWHERE.to_owned());
        Self { student, rank: None, cell, quantity: Quantity::DeltaMargin }
    }
}

impl fmt::Display for StudentNumber {
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
    /// The claim, or a part of it.
    #[default]
    Test,
    /// A precondition of the tests: that there is an effect.
    Premise,
    /// If it fails, tests that hold do not support the claim.
    Control,
}

/// The method by which the numbers of runs become an estimate with an interval. Data sets are clusters: the number of a
/// data set below is its mean over the traits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The mean of `of`; Student's interval over data sets.
    Mean,
    /// The mean of `of` − `minus`, paired; Student's interval over data sets.
    Difference,
    /// The mean of `of` over the mean of `all`, which are changes from the same base; Fieller's interval over data
    /// sets.
    Recovered,
    /// The slope of `of` over `over`, within each data set; Student's interval over data sets.
    Slope,
    /// The slope per doubling of the rank, up to the rank at which the mean is highest; Student's interval over data
    /// sets.
    Rise,
    /// The slope per doubling of the rank, from the rank at which the mean is highest on; Student's interval over data
    /// sets.
    Fall,
    /// The largest difference between traits in the log₂ of the rank at which they are highest; its p-value from
    /// exchanging the traits within each data set.
    PeakSpread,
    /// The diagonal contrast γ of trained and evaluated traits, within each data set; Student's interval over data
    /// sets, p from permuting the traits of the runs.
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

/// A test: a number and its expected range.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Test {
    /// The sentence that it tests.
    pub name: String,
    /// Its purpose.
    #[serde(default)]
    pub role: Role,
    /// The method of estimation.
    pub kind: Kind,
    /// The number that is tested.
    #[serde(default)]
    pub of: StudentNumber,
    /// The number that is subtracted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minus: Option<StudentNumber>,
    /// The number that `of` is divided by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub all: Option<StudentNumber>,
    /// The axis of the slope.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub over: Option<Over>,
    /// The test holds if the interval is above this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub above: Option<f64>,
    /// The test holds if the interval is below this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub below: Option<f64>,
}

/// The form of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FigureKind {
    /// A bar for each student in each condition, with its data sets as points.
    Bars,
    /// Quantities over the rank: a panel for each quantity, a line for each student.
    Ranks,
    /// As `Ranks`, with a line for each trait.
    RanksByTrait,
    /// A heat map of students by conditions.
    Heatmap,
    /// A heat map of trained by evaluated traits.
    Matrix,
}

/// A figure of a claim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// Its form.
    pub kind: FigureKind,
    /// Its title.
    pub title: String,
    /// The quantities: over ranks each has a panel, otherwise only the first is drawn.
    #[serde(default = "margin")]
    pub quantities: Vec<Quantity>,
    /// The students that are drawn, in this order; if left out, all that have the numbers.
    #[serde(default)]
    pub students: Vec<String>,
    /// The conditions that are drawn, in this order; all if left out.
    #[serde(default)]
    pub cells: Vec<String>,
    /// Whether each trait has bars.
    #[serde(default)]
    pub by_trait: bool,
}

fn margin() -> Vec<Quantity> {
    vec![Quantity::DeltaMargin]
}
