//! A published claim put to the test. `file` is the TOML; `study` is the claim at one size; `run` trains its students
//! and has `measure` and `ask` make the table of outcomes. All else follows from that table alone: the students that a
//! fit picks out (`chosen`), the numbers (`estimate`), what they decide (`verdict`), the figures, tables of one kind,
//! and the page.

mod ask;
mod chosen;
mod estimate;
mod figures;
mod file;
mod measure;
mod outcome;
mod page;
mod plan;
pub mod run;
mod study;
pub mod tables;
mod verdict;

pub use chosen::with_chosen;
pub use file::{
    Chosen, Claim, EVERYWHERE, EvalCondition, Figure, FigureKind, Kind, Over, RankAxis, Role, StudentNumber, THROUGH,
    Test,
};
pub use outcome::{Measurement, OutcomeRow, Quantity};
pub use study::{Size, Study, Unit, UnitStudent};
pub use verdict::{ALL, Outcome, TestRow, Verdict, Word, tests};
