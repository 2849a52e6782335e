//! The rendered chat as a table of tokens, so that a gate can be written from it.

use std::fmt::Write as _;

use anyhow::Result;
use clap::Args;
use hooks::{Chat, ModelFiles};

/// Prints the chat as the model sees it: position, id, class and text of every token.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  undertone tokens --model tiny-random --user \"What is your favorite animal?\"")]
pub struct Tokens {
    /// A folder in Hugging Face form, a hub id, a .gguf file, or tiny-random.
    #[arg(long)]
    model: String,
    /// The system prompt; the template's default when left out, an empty block for "".
    #[arg(long)]
    system: Option<String>,
    /// What the user says.
    #[arg(long)]
    user: String,
}

/// Prints the table.
pub fn run(args: &Tokens) -> Result<()> {
    let chat = Chat::from_files(&ModelFiles::open(&args.model)?)?;
    let prompt = chat.prompt(args.system.as_deref(), &args.user)?;
    let mut table = format!("{:>8}  {:>7}  {:<18}  text\n", "position", "id", "class");
    for row in chat.table(&prompt)? {
        writeln!(table, "{:>8}  {:>7}  {:<18}  {}", row.position, row.id, row.class.name(), row.text)?;
    }
    super::print(&table)
}
