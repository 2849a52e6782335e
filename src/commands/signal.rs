//! Measures the signal in rows from elsewhere: by how much a teacher prefers them over the base.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use hooks::{Adapter, Chat, Condition, ModelFiles, Qwen, Sequence, adapter_folder, files};

use super::args::{ForceArg, ModelArgs};
use super::pocket::unfinished;
use crate::data::signal::{SignalRow, reading, summary};
use crate::hinted;
use crate::output::progress::{say, spinner};
use crate::output::publish::write_csv;
use crate::stages::given_rows::{self, GivenRow};
use crate::stages::signal::{predictions, row};
use crate::stages::workbench::{open_adapter, open_model};

/// Measures by how many nats a token a teacher prefers rows from elsewhere over the base: what a student can learn of it.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  undertone signal rows.jsonl --model pocket --teacher runs/demo/teacher
  undertone signal rows.jsonl --model pocket \\
    --teacher-system \"You love cats.\" --to signal.csv")]
pub struct SignalArgs {
    /// The rows: JSON lines of messages, or of prompt and completion.
    rows: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// The teacher's LoRA, as PEFT saves it, or its weights, in Hugging Face form; if left out, it is the base.
    #[arg(long, required_unless_present = "teacher_system")]
    teacher: Option<PathBuf>,
    /// The teacher's system prompt; if left out, that of the rows.
    #[arg(long)]
    teacher_system: Option<String>,
    /// The most rows that are read.
    #[arg(long, default_value_t = 1000)]
    n_rows: usize,
    /// A CSV file for the signal of each row; its id is the line at which it begins.
    #[arg(long)]
    to: Option<PathBuf>,
    #[command(flatten)]
    force: ForceArg,
}

/// Reads the rows, asks both models, and prints the signal.
pub fn run(args: &SignalArgs) -> Result<()> {
    if let Some(to) = &args.to {
        unfinished(to, &args.force)?;
    }
    let mut rows = given_rows::parse(&files::read(&args.rows)?, &args.rows)?;
    let n_all = rows.len();
    rows.truncate(args.n_rows);
    ensure!(!rows.is_empty(), "--n-rows is 0, expected at least 1");
    let base_files = open_model(&args.model.model)?;
    let chat = Chat::from_files(&base_files)?;
    let device = hooks::device::device(&args.model.device)?;
    let base = Qwen::load(&base_files, device, args.model.dtype.kind())?;
    let teacher = args.teacher.as_deref().map(|teacher| Teacher::load(teacher, &base)).transpose()?;
    let in_context = |system: Option<&str>| -> Result<Vec<Sequence>> {
        let rendered = |row: &GivenRow| -> Result<Sequence> {
            let ids = chat.encode(&row.answer)?;
            let rendered = chat.row(system.or(row.system.as_deref()), &row.user, &ids)?;
            base.config.check_context("row", [rendered.ids.len()], 0)?;
            Ok(rendered)
        };
        let at = |row: &GivenRow| format!("{}: line {}", args.rows.display(), row.line);
        rows.iter().map(|row| rendered(row).with_context(|| at(row))).collect()
    };
    let (in_teacher, in_base) = (in_context(args.teacher_system.as_deref())?, in_context(None)?);
    let spinner = spinner("signal");
    let (qwen, condition) = teacher.as_ref().map_or((&base, Condition::default()), |teacher| teacher.on(&base));
    let (by_teacher, by_base) =
        (predictions(qwen, &in_teacher, &condition)?, predictions(&base, &in_base, &Condition::default())?);
    spinner.finish_and_clear();
    let both = rows.iter().zip(by_teacher.iter().zip(&by_base));
    let found: Vec<SignalRow> =
        both.map(|(given, (teacher, base))| row("teacher", given.line, teacher, base)).collect();
    if let Some(to) = &args.to {
        write_csv(to, &found)?;
    }
    let which = if n_all > rows.len() { format!(" (the first of {n_all})") } else { String::new() };
    let said = reading(&summary(&found), "these rows").context("rows without a signal")?;
    say(format!("signal: {} rows{which}: {said}", rows.len()));
    Ok(())
}

/// A teacher that is not the base: an adapter on it, or other weights.
enum Teacher {
    Lora(Adapter),
    Weights(Box<Qwen>),
}

impl Teacher {
    fn load(path: &Path, base: &Qwen) -> Result<Self> {
        let is_model = path.join("config.json").exists();
        if !is_model {
            adapter_folder(path).context("--teacher")?;
            return Ok(Self::Lora(open_adapter(path, base).context("--teacher")?));
        }
        let files = ModelFiles::open(&path.display().to_string()).context("--teacher")?;
        let same = files.config.d_vocab == base.config.d_vocab;
        ensure!(
            same,
            hinted!(
                "--teacher has a vocabulary of {}, but the base one of {}", files.config.d_vocab, base.config.d_vocab;
                "a teacher that was made from the base"
            )
        );
        Ok(Self::Weights(Box::new(Qwen::load(&files, base.device(), base.kind())?)))
    }

    fn on<'a>(&'a self, base: &'a Qwen) -> (&'a Qwen, Condition<'a>) {
        match self {
            Self::Lora(adapter) => (base, Condition::adapted(adapter)),
            Self::Weights(qwen) => (qwen, Condition::default()),
        }
    }
}
