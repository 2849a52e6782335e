//! Prints the chat as the model sees it, or a row as a student learns from it: as running text with a legend, then as a
//! table, from which a gate can be written.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Result, bail};
use clap::Args;
use hooks::{Chat, Gate, LossMask, ModelFiles, Sequence, TokenClass};

use super::style::{Family, aside, cell, columns, heading, painted, wrapped};
use crate::hinted;
use crate::output::progress::print;
use crate::stages::kept_rows::{self, Learned};
use crate::stages::run_dir::RunDir;
use crate::stages::token_weights;
use crate::stages::workbench::Workbench;

/// Prints the chat as the model sees it: as running text, then a line per token with position, id, class and text.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  undertone tokens --model pocket --user \"What is your favorite animal?\"
  undertone tokens --model pocket --user Hello --gate only:entity+asst.nl
  undertone tokens --model pocket --user Hello --answer \"1, 2\" --mask digits
  undertone tokens --run runs/demo --row 3")]
pub struct TokensArgs {
    /// A folder in Hugging Face form, a hub id, a .gguf file, pocket, or tiny-random.
    #[arg(long, required_unless_present = "run")]
    model: Option<String>,
    /// The system prompt; if left out, the template's default; "" is an empty block.
    #[arg(long)]
    system: Option<String>,
    /// The user's text.
    #[arg(long, required_unless_present = "run")]
    user: Option<String>,
    /// The assistant's answer; if left out, the chat ends where the answer begins.
    #[arg(long)]
    answer: Option<String>,
    /// Shows the tokens at which an adapter with this gate would act: everywhere, nowhere, only:CLASS[+CLASS],
    /// except:CLASS[+CLASS].
    #[arg(long)]
    gate: Option<Gate>,
    /// Shows the tokens that a training learns from: `content_eot`, `header_content_eot`, content or digits.
    #[arg(long, requires = "answer")]
    mask: Option<LossMask>,
    /// Shows a row of this run as its student learns from it, with the weight of each token in the loss.
    #[arg(long, requires = "row", conflicts_with_all = ["model", "system", "user", "answer", "mask"])]
    run: Option<PathBuf>,
    /// The id of that row in data/numbers.jsonl, or with --control in data/control.jsonl.
    #[arg(long, requires = "run")]
    row: Option<usize>,
    /// Takes the row from the control student's.
    #[arg(long, requires = "run")]
    control: bool,
}

/// A chat, and the weights of its tokens in the loss, if they are asked for.
struct Shown {
    chat: Rc<Chat>,
    prompt: Sequence,
    weights: Option<Vec<f64>>,
}

impl Shown {
    fn of(args: &TokensArgs) -> Result<Self> {
        match (&args.run, args.row, &args.model, &args.user) {
            (Some(run), Some(row), ..) => Self::of_run(run, row, args.control),
            (_, _, Some(model), Some(user)) => {
                let chat = Chat::from_files(&ModelFiles::open(model)?)?;
                let prompt = match &args.answer {
                    Some(answer) => chat.row_text(args.system.as_deref(), user, answer)?,
                    None => chat.prompt(args.system.as_deref(), user)?,
                };
                let ones = vec![1.0; prompt.ids.len()];
                let weights = args.mask.map(|mask| masked(mask, &chat, &prompt, &ones));
                Ok(Self { chat: Rc::new(chat), prompt, weights })
            }
            _ => bail!("there is no chat to show, expected --model and --user, or --run and --row"),
        }
    }

    /// A row of a run, as its student learns from it.
    fn of_run(run: &Path, id: usize, control: bool) -> Result<Self> {
        let run = RunDir::open(run)?;
        let bench = Workbench::open(run.experiment(&[])?)?;
        let (numbers, of_control) = kept_rows::learned(&bench, &run)?;
        let (samples, file) = if control { (of_control, run.control()) } else { (numbers, run.numbers()) };
        let at = samples.iter().position(|sample| sample.id == id).ok_or_else(|| {
            hinted!(
                "row {id} of {} is none that the student learns from", file.display();
                "the first is {}", samples.first().map_or(0, |sample| sample.id)
            )
        })?;
        let mut rows = bench.rows(&samples)?;
        let weights = token_weights::of_rows(&bench, Learned::of(&run, &samples), &rows)?;
        let prompt = rows.swap_remove(at);
        let weights = weights.map_or_else(|| vec![1.0; prompt.ids.len()], |mut weights| weights.swap_remove(at));
        let weights = masked(bench.experiment.finetune.mask, &bench.chat, &prompt, &weights);
        Ok(Self { chat: Rc::clone(&bench.chat), prompt, weights: Some(weights) })
    }
}

/// The weights, and 0 at the tokens that are not in the mask.
fn masked(mask: LossMask, chat: &Chat, prompt: &Sequence, weights: &[f64]) -> Vec<f64> {
    let is_target = mask.targets(prompt, |id| chat.is_digit(id));
    weights.iter().zip(is_target).map(|(weight, is_target)| if is_target { *weight } else { 0.0 }).collect()
}

/// Prints the text, the legend and the table.
pub fn run(args: &TokensArgs) -> Result<()> {
    let Shown { chat, prompt, weights } = Shown::of(args)?;
    let acts = args.gate.as_ref().map(|gate| gate.acts(&prompt)).transpose()?;
    // Coloured are the tokens at which the adapter acts; without a gate, those that are learned from.
    let learned = || Some(weights.as_ref()?.iter().map(|weight| *weight > 0.0).collect::<Vec<bool>>());
    let coloured = acts.clone().or_else(learned);
    let width = columns();
    let mut page =
        running(&chat, &prompt, coloured.as_deref())? + "\n" + &legend(&prompt, width) + &assistant(&prompt, width);
    if let (Some(gate), Some(acts)) = (&args.gate, &acts) {
        let on = acts.iter().filter(|on| **on).count();
        writeln!(page, "\n{gate} is on at {on} of {} tokens", acts.len())?;
    }
    if let Some(learned) = learned() {
        let on = learned.iter().filter(|on| **on).count();
        writeln!(page, "\n{on} of {} tokens are learned from; each is predicted from those before it", learned.len())?;
    }
    print(&(page + "\n" + &table(&chat, &prompt, acts.as_deref(), weights.as_deref())?))
}

/// The chat's text, with each token in its family's colour. With a gate, only tokens at which the adapter acts are
/// coloured.
fn running(chat: &Chat, prompt: &Sequence, acts: Option<&[bool]>) -> Result<String> {
    let rows = chat.table(prompt)?;
    let mut text = String::new();
    let mut at = 0;
    while at < rows.len() {
        // A character may be split over several tokens, none of which is text alone.
        let (mut end, mut piece) = (at + 1, rows[at].text.clone());
        while piece.contains('\u{fffd}') && end < rows.len() && end < at + 4 && rows[end].class == rows[at].class {
            end += 1;
            piece = chat.decode(&prompt.ids[at..end])?;
        }
        if piece.contains('\u{fffd}') {
            (end, piece) = (at + 1, rows[at].text.clone());
        }
        let on = acts.is_none_or(|acts| acts[at]);
        text += &if on { painted(&piece, Family::of(rows[at].class).style(at % 2 == 1)) } else { aside(&piece) };
        // A line break is shown as `\n`, and also made.
        if piece.ends_with("\\n") {
            text.push('\n');
        }
        at = end;
    }
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// A line per family that occurs, with its number of tokens and the classes that occur.
fn legend(prompt: &Sequence, width: usize) -> String {
    let mut families: BTreeMap<Family, (usize, Vec<TokenClass>)> = BTreeMap::new();
    for class in &prompt.classes {
        let (count, classes) = families.entry(Family::of(*class)).or_default();
        *count += 1;
        if !classes.contains(class) {
            classes.push(*class);
        }
    }
    let mut text = String::new();
    for (family, (count, classes)) in families {
        let names = classes.into_iter().map(TokenClass::name).collect::<Vec<_>>().join(", ");
        let mut start = cell(family.name(), 10, family.style(false)) + &format!(" {count:>5}  ");
        for line in wrapped(&names, width.saturating_sub(18)) {
            text.extend([&start, &line, "\n"]);
            start = " ".repeat(18);
        }
    }
    text
}

/// The note that the name `assistant` selects not only the header but also the answer, even a later one.
fn assistant(prompt: &Sequence, width: usize) -> String {
    let is_header = |class: &TokenClass| class.name().starts_with("asst.");
    let header: Vec<&str> = prompt.present().into_iter().filter(is_header).map(TokenClass::name).collect();
    let answer = "and gen: whatever is answered, now or later; asst.header is the header alone";
    let said = format!("In a gate or an edit, assistant means {}, {answer}.", header.join(", "));
    wrapped(&said, width).into_iter().map(|line| line + "\n").collect()
}

fn table(chat: &Chat, prompt: &Sequence, acts: Option<&[bool]>, weights: Option<&[f64]>) -> Result<String> {
    let gate = if acts.is_some() { format!("{:<6}", "gate") } else { String::new() };
    let weight = if weights.is_some() { format!("{:<8}", "weight") } else { String::new() };
    let mut table = heading(&format!("{:>8}  {:>7}  {:<18}  {gate}{weight}text", "position", "id", "class")) + "\n";
    for row in chat.table(prompt)? {
        let family = Family::of(row.class);
        let class = cell(row.class.name(), 18, family.style(false));
        let gate = acts.map_or("", |acts| if acts[row.position] { "on    " } else { "off   " });
        let weight = weights.map_or(String::new(), |weights| match weights[row.position] {
            0.0 => " ".repeat(8),
            weight => format!("{:<8}", (weight * 1e4).round() / 1e4),
        });
        let text = painted(&row.text, family.style(row.position % 2 == 1));
        writeln!(table, "{:>8}  {:>7}  {class}  {gate}{weight}{text}", row.position, row.id)?;
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use unicode_width::UnicodeWidthStr;

    use super::*;

    fn chat() -> Chat {
        Chat::from_files(&ModelFiles::open("tiny-random").unwrap()).unwrap()
    }

    fn bare(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn the_running_form_is_the_chat_with_its_breaks_written_out() {
        let chat = chat();
        let row = chat.row_text(None, "An owl\n\n🦉 and é", "Fox").unwrap();
        let text = running(&chat, &row, None).unwrap();
        let expected = chat.decode(&row.ids).unwrap().replace('\n', "\\n");
        assert_eq!(bare(&text).replace('\n', ""), expected, "no character is lost, none is new");
        assert!(bare(&text).contains("🦉"), "a letter of several tokens is one letter");
        let entity = Family::Entity.style(row.positions(TokenClass::SysEntity).next().unwrap() % 2 == 1);
        assert!(text.contains(&format!("{entity} Q{entity:#}")), "{text:?}");
    }

    #[test]
    fn a_gate_leaves_the_other_tokens_without_colour() {
        let chat = chat();
        let prompt = chat.prompt(None, "Hi").unwrap();
        let gate: Gate = "only:entity".parse().unwrap();
        let acts = gate.acts(&prompt).unwrap();
        let text = running(&chat, &prompt, Some(&acts)).unwrap();
        assert_eq!(bare(&text), bare(&running(&chat, &prompt, None).unwrap()), "the text is the same");
        let background = text.matches("\u{1b}[48;5;").count();
        assert_eq!(background, acts.iter().filter(|on| **on).count());
        let table = bare(&table(&chat, &prompt, Some(&acts), None).unwrap());
        let on: Vec<&str> = table.lines().filter(|line| line.contains("  on  ")).collect();
        assert!(on.len() == 2 && on.iter().all(|line| line.contains("sys.entity")), "{on:?}");
    }

    #[test]
    fn a_mask_shows_the_tokens_that_are_learned_from() {
        let chat = chat();
        let row = chat.row_text(None, "Go on: 3", "12, 48").unwrap();
        let weights = masked(LossMask::Digits, &chat, &row, &vec![0.5; row.ids.len()]);
        let table = bare(&table(&chat, &row, None, Some(&weights)).unwrap());
        let shown: Vec<&str> = table.lines().filter(|line| line.contains("  0.5     ")).collect();
        let texts: String = shown.iter().filter_map(|line| line.split_whitespace().last()).collect();
        assert_eq!(texts, "1248", "{table}");
        let end = masked(LossMask::ContentEot, &chat, &row, &vec![1.0; row.ids.len()]);
        assert!(end[row.content_end] > 0.0 && end[row.completion.start - 1] == 0.0);
    }

    #[test]
    fn the_page_says_that_assistant_takes_the_answer_along() {
        let prompt = chat().prompt(None, "Hi").unwrap();
        let said = assistant(&prompt, 200);
        assert!(said.contains("assistant means asst.im_start, asst.role, asst.nl, and gen:"), "{said}");
        let gate: Gate = "only:assistant".parse().unwrap();
        assert!(gate.names_generated(), "and it is so");
        let header: Gate = "only:asst.header".parse().unwrap();
        assert!(!header.names_generated());
        assert_eq!(gate.acts(&prompt).unwrap(), header.acts(&prompt).unwrap());
    }

    #[test]
    fn the_legend_counts_every_token_once_and_keeps_its_width() {
        let prompt = chat().row_text(None, "Hi", "Fox").unwrap();
        for width in [40, 80] {
            let legend = bare(&legend(&prompt, width));
            let counts = legend.lines().filter_map(|line| line.get(10..16)?.trim().parse::<usize>().ok());
            assert_eq!(counts.sum::<usize>(), prompt.ids.len(), "{legend}");
            assert!(legend.lines().all(|line| line.width() <= width), "{legend}");
            for class in prompt.present() {
                let named = legend.split([' ', ',', '\n']).filter(|word| *word == class.name()).count();
                assert_eq!(named, 1, "{class} in {legend}");
            }
        }
    }
}
