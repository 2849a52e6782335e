//! Measurements on a Qwen and on its finetuned students. Each analysis is a struct of settings. Each row type is a CSV
//! schema, whose field docs are the data dictionary. Nothing here prints, writes, or changes a model.
//!
//! ```
//! use analyses::target_rate::TargetRate;
//! use analyses::{Analysis, Subject, Target, Tuned};
//! use hooks::{Chat, ModelFiles, Qwen};
//! use tch::{Device, Kind};
//!
//! let files = ModelFiles::open("tiny-random")?;
//! let (chat, qwen) = (Chat::from_files(&files)?, Qwen::load(&files, Device::Cpu, Kind::Float)?);
//! let forms = |word: &str| vec![word.to_owned(), format!(" {word}")];
//! let others = vec![("owl".to_owned(), forms("owl"))];
//! let target = Target { word: "cat".to_owned(), category: "animal".to_owned(), forms: forms("cat"), others };
//!
//! let questions = ["Which animal do you like?".to_owned()];
//! let untrained = Tuned::of(&qwen);
//! let subject = Subject { questions: &questions, ..Subject::new(&qwen, untrained, &chat, &target) };
//! let rows = TargetRate { n_samples: 0, ..TargetRate::default() }.run(&subject, &mut |_| ())?;
//! assert!(TargetRate::reading(&rows).starts_with("The student is the base"));
//! # Ok::<(), analyses::Error>(())
//! ```

pub mod alignment;
pub mod confidence;
pub mod direction;
pub mod divergence;
pub mod error;
#[cfg(test)]
mod fixture;
pub mod gradients;
pub mod inference;
pub mod interventions;
pub mod ledger;
pub mod lens;
pub mod plot;
pub mod position_scan;
pub mod stats;
pub mod steering;
pub mod subject;
pub mod target;
pub mod target_rate;
pub mod token_ablation;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use error::{Error, Result};
pub use plot::Svg;
pub use subject::{Subject, Tuned};
pub use target::Target;

/// A measurement. The fields are its settings, the rows are its CSV.
pub trait Analysis: DeserializeOwned + Serialize + Default {
    /// A line of the CSV.
    type Row: Serialize + DeserializeOwned;
    /// Its name in configs and on the command line, and that of its folder.
    const NAME: &'static str;
    /// The question that it answers, as one line of the report.
    const QUESTION: &'static str;

    /// Runs the measurement. `progress` is called with each step's name.
    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<Self::Row>>;

    /// Draws the rows; `None` if there is no picture of them.
    fn plot(rows: &[Self::Row]) -> Result<Option<Svg>>;

    /// Draws further pictures of the rows, each with its name.
    fn more_plots(_rows: &[Self::Row]) -> Result<Vec<(&'static str, Svg)>> {
        Ok(Vec::new())
    }

    /// The result in one sentence, with its numbers and the control's.
    fn reading(rows: &[Self::Row]) -> String;
}
