//! A chat as tokens, each with its class: rendered in pieces, tokenised once, and compared with the model's template.
//!
//! A Jinja engine returns the text without saying which part wrote it. So `pieces.rs` writes the pieces, and every text
//! they make is compared with the model's own template on the same chat. If the two differ, the template is refused
//! with the first difference shown: no class can be silently wrong.

use std::fmt::Display;

use serde::Serialize;
use tokenizers::{PostProcessorWrapper, Tokenizer};

use crate::chat::pieces::{IM_END, IM_START, Piece, Shape, class_of};
use crate::chat::template::{Role, Template, Turn};
use crate::chat::tokens::{Sequence, TokenClass};
use crate::error::{Error, Result};
use crate::load::model_files::ModelFiles;

const END_OF_TEXT: &str = "<|endoftext|>";

/// A tokenizer and its chat template, with which the rendering is compared when it is made and at every prompt.
#[derive(Debug)]
pub struct Chat {
    tokenizer: Tokenizer,
    template: Template,
    shape: Shape,
    specials: Vec<String>,
    im_end: i64,
    newline: Vec<i64>,
}

/// A token of a rendered chat, as a line of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TokenInfo {
    /// The position, from 0.
    pub position: usize,
    /// The token.
    pub id: i64,
    /// Its text, control characters escaped (`\n`).
    pub text: String,
    /// Its class.
    pub class: TokenClass,
}

impl Chat {
    /// Reads from the template the text that it adds to a chat (a default system prompt, a think block). Probe chats
    /// then show that it differs in nothing else from the known shape.
    pub fn new(mut tokenizer: Tokenizer, chat_template: &str) -> Result<Self> {
        // A post-processor may trim the offsets by which tokens get their classes. Truncation and padding would change
        // the chat.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(said)?;

        let template = Template::new(chat_template);
        let chat = template.render(&HI, false)?;
        let default_system = chat
            .strip_prefix("<|im_start|>system\n")
            .and_then(|rest| rest.strip_suffix("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"));

        let added = tokenizer.get_added_tokens_decoder();
        let mut specials: Vec<_> =
            added.values().filter(|token| token.special).map(|token| token.content.clone()).collect();
        specials.sort();
        let mut chat = Self {
            im_end: 0,
            newline: Vec::new(),
            shape: Shape {
                default_system: default_system.map(str::to_owned),
                think: before_the_answer(&template)?,
                entities: vec!["Qwen".to_owned()],
                bare: false,
            },
            specials,
            template,
            tokenizer,
        };
        chat.special(IM_START)?;
        chat.im_end = chat.special(IM_END)?;
        chat.newline = chat.encode("\n")?;
        chat.prove_on_probes()?;
        Ok(chat)
    }

    /// The chat of a model's files, which must hold a tokenizer and a chat template.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        let name = &files.name;
        let tokenizer = files.tokenizer.clone().ok_or_else(|| {
            said(format!("{name} has none, so there is no chat; expected a tokenizer.json beside the weights"))
        })?;
        let template = files.chat_template.as_ref().ok_or_else(|| Error::ChatTemplate {
            problem: format!(
                "{name} has none; expected chat_template in tokenizer_config.json, or a chat_template.jinja"
            ),
        })?;
        Self::new(tokenizer, template)
    }

    /// Sets the words that name the model in a system prompt (default: "Qwen"). Matches are case-sensitive and whole
    /// words; a word also ends where the script changes.
    #[must_use]
    pub fn with_entities(self, entities: Vec<String>) -> Self {
        Self { shape: Shape { entities, ..self.shape }, ..self }
    }

    /// Turns thinking on: a prompt ends where the model's thoughts start, and an answer begins with them, as
    /// `<think>\n…\n</think>\n\n…`. An error if the template has no such switch (Qwen2.5).
    pub fn with_thinking(mut self) -> Result<Self> {
        self.template.thinking = true;
        let think = before_the_answer(&self.template)?;
        if think == self.shape.think {
            let problem = "thinking is asked for, but it renders the same without".to_owned();
            return Err(Error::ChatTemplate { problem }.with_hint("Qwen3's can think"));
        }
        self.shape.think = think;
        self.prove_on_probes()?;
        Ok(self)
    }

    /// Renders without a template: a line with the system prompt, if there is one, a line with the user's text, then
    /// the answer. No token has a class of the template, except the line break before the answer, which is `asst.nl`.
    #[must_use]
    pub fn without_template(self) -> Self {
        Self { shape: Shape { entities: self.shape.entities, bare: true, ..Shape::default() }, ..self }
    }

    /// The system prompt that the template writes if none is given; `None` if it then writes no system turn.
    pub fn default_system(&self) -> Option<&str> {
        self.shape.default_system.as_deref()
    }

    /// The chat up to where the answer starts. If `system` is `None`, the template's default is used; `Some("")` is an
    /// empty turn.
    pub fn prompt(&self, system: Option<&str>, user: &str) -> Result<Sequence> {
        let turns = self.turns(system, user)?;
        self.tokenise(&self.proven(&turns, true)?)
    }

    /// A whole row: the prompt, the answer's tokens as they were sampled (never re-tokenised), and, if there is a
    /// template, `<|im_end|>` and a line break.
    pub fn row(&self, system: Option<&str>, user: &str, completion_ids: &[i64]) -> Result<Sequence> {
        let stops = self.stop_ids();
        if let Some(index) = completion_ids.iter().position(|id| stops.contains(id)) {
            return Err(Error::invalid(
                format!("completion token {index}"),
                "content without the end of the turn, which is added to it",
                format!("{} ({})", completion_ids[index], self.token_text(completion_ids[index])?),
            ));
        }
        let mut row = self.prompt(system, user)?.with_completion(completion_ids);
        if self.shape.bare {
            return Ok(row); // the end of a turn is the template's
        }
        row.ids.push(self.im_end);
        row.ids.extend_from_slice(&self.newline);
        row.classes.resize(row.ids.len(), TokenClass::Gen);
        row.completion.end = row.ids.len();
        Ok(row)
    }

    /// A whole row from the answer's text, tokenised by itself: the prompt's tokens are those of `prompt`, as they are
    /// when the model answers. An error if the template would change the answer's text.
    pub fn row_text(&self, system: Option<&str>, user: &str, completion: &str) -> Result<Sequence> {
        let mut turns = self.turns(system, user)?;
        self.refuse_special("answer", completion)?;
        turns.push(Turn { role: Role::Assistant, content: completion });
        self.proven(&turns, false)?;
        self.row(system, user, &self.encode(completion)?)
    }

    /// The tokens of a prompt as a table, from which a gate can be written.
    pub fn table(&self, prompt: &Sequence) -> Result<Vec<TokenInfo>> {
        let tokens = prompt.ids.iter().zip(&prompt.classes).enumerate();
        let row = |(position, (id, class)): (usize, (&i64, &TokenClass))| {
            let mut text = String::new();
            for letter in self.token_text(*id)?.chars() {
                if letter.is_control() { text.extend(letter.escape_default()) } else { text.push(letter) }
            }
            Ok(TokenInfo { position, id: *id, text, class: *class })
        };
        tokens.map(row).collect()
    }

    /// The tokens of a plain text. Special tokens that are written in it are read as such.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(said)?;
        Ok(encoding.get_ids().iter().map(|id| i64::from(*id)).collect())
    }

    /// The text of tokens, special ones included. Ids that the tokenizer has no token for (a model's vocabulary is
    /// padded) read `<|id 151700|>`.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let known = |id: &i64| u32::try_from(*id).ok().filter(|id| self.tokenizer.id_to_token(*id).is_some());
        let mut text = String::new();
        for run in ids.chunk_by(|left, right| known(left).is_some() && known(right).is_some()) {
            let ids: Vec<u32> = run.iter().filter_map(known).collect();
            match run {
                [id] if ids.is_empty() => text.extend(["<|id ", &id.to_string(), "|>"]),
                _ => text += &self.tokenizer.decode(&ids, false).map_err(said)?,
            }
        }
        Ok(text)
    }

    /// The text of one token.
    pub fn token_text(&self, id: i64) -> Result<String> {
        self.decode(&[id])
    }

    /// The token that ends a turn, `<|im_end|>`.
    pub fn end_of_turn(&self) -> i64 {
        self.im_end
    }

    /// The tokens at which an answer ends: `<|im_end|>` and, where the tokenizer has it, `<|endoftext|>`.
    pub fn stop_ids(&self) -> Vec<i64> {
        let end_of_text = self.tokenizer.token_to_id(END_OF_TEXT).map(i64::from);
        std::iter::once(self.im_end).chain(end_of_text).collect()
    }

    /// True when the token is one or several ASCII digits and nothing else.
    pub fn is_digit(&self, id: i64) -> bool {
        let token = u32::try_from(id).ok().and_then(|id| self.tokenizer.id_to_token(id));
        token.is_some_and(|token| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_digit()))
    }

    /// The turns of a prompt. Refuses a text that contains a special token.
    fn turns<'a>(&self, system: Option<&'a str>, user: &'a str) -> Result<Vec<Turn<'a>>> {
        self.refuse_special("system prompt", system.unwrap_or_default())?;
        self.refuse_special("user's text", user)?;
        let system = system.map(|content| Turn { role: Role::System, content });
        Ok(system.into_iter().chain([Turn { role: Role::User, content: user }]).collect())
    }

    /// Refuses a special token in a text, since the tokenizer would read it as one: it could end the turn and forge
    /// another.
    fn refuse_special(&self, what: &str, text: &str) -> Result<()> {
        let found = self.specials.iter().find_map(|special| Some((special, text.split_once(special.as_str())?.0)));
        let Some((special, before)) = found else { return Ok(()) };
        Err(Error::invalid(
            format!("a special token in the {what}"),
            "none, as it would forge the chat",
            format!("{special} at character {}", before.chars().count()),
        ))
    }

    /// The id of a token that the template's shape needs.
    fn special(&self, token: &str) -> Result<i64> {
        match self.encode(token)?[..] {
            [id] => Ok(id),
            ref ids => Err(said(format!(
                "{token} is {} tokens, expected one special token; chats of Qwen's shape need it",
                ids.len()
            ))),
        }
    }

    /// The pieces of a chat. An error if the model's template renders another text.
    fn proven<'a>(&'a self, turns: &[Turn<'a>], generation: bool) -> Result<Vec<Piece<'a>>> {
        let pieces = self.shape.pieces(turns, generation);
        if self.shape.bare {
            return Ok(pieces);
        }
        let known: String = pieces.iter().map(|piece| piece.text).collect();
        let rendered = self.template.render(turns, generation)?;
        if known == rendered {
            return Ok(pieces);
        }
        let at = known.chars().zip(rendered.chars()).take_while(|(left, right)| left == right).count();
        let excerpt = |text: &str| text.chars().skip(at.saturating_sub(20)).take(50).collect::<String>();
        let roles: Vec<_> = turns.iter().map(|turn| format!("{:?}", turn.role).to_lowercase()).collect();
        let ending = if generation { " and a generation prompt" } else { "" };
        Err(Error::ChatTemplate {
            problem: format!(
                "it is not of the known shape (Qwen2, Qwen2.5, Qwen3); for a chat of {}{ending}, the first difference is at character {at}: \
                 the template has {:?}, expected {:?}",
                roles.join(", "),
                excerpt(&rendered),
                excerpt(&known)
            ),
        })
    }

    /// Compares probe chats with the template: with, without and with an empty system prompt, several turns, odd texts.
    fn prove_on_probes(&self) -> Result<()> {
        use Role::{Assistant, System, User};
        let odd = "\n\n {{ 7 }} {% x %} {# y #} <b>'\"&\\</b> \u{e9}\u{1f989}\u{4f60}\t \n";
        let probes: [&[(Role, &str)]; 8] = [
            &[(User, "How are you?")],
            &[(System, "Be brief."), (User, "How are you?")],
            &[(System, ""), (User, "")],
            &[(System, odd), (User, odd)],
            &[(User, "One?"), (Assistant, "1"), (User, "Two?")],
            &[(System, "Count."), (User, "One?"), (Assistant, "1, 2"), (User, "Two?"), (Assistant, "3"), (User, odd)],
            &[(User, "One?"), (Assistant, "1, 2")],
            &[(System, "Count."), (User, "One?"), (Assistant, "1"), (User, odd), (Assistant, "2 {{ 3 }}")],
        ];
        for probe in probes {
            let mut turns: Vec<_> = probe.iter().map(|(role, content)| Turn { role: *role, content }).collect();
            if let Some(Turn { role: Assistant, content }) = turns.last_mut().filter(|_| self.template.thinking) {
                *content = "<think>\nSo.\n</think>\n\n1, 2";
            }
            self.proven(&turns, false)?;
            if probe.last().is_some_and(|(role, _)| *role == User) {
                self.proven(&turns, true)?;
            }
        }
        Ok(())
    }

    /// Tokenises the pieces' whole text at once and finds the class of each token. The result is a prompt without an
    /// answer.
    fn tokenise(&self, pieces: &[Piece<'_>]) -> Result<Sequence> {
        let mut text = String::new();
        let mut spans = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let start = text.len();
            text += piece.text;
            spans.push((start..text.len(), piece.class));
        }
        let encoding = self.tokenizer.encode(&*text, false).map_err(said)?;
        let ids: Vec<i64> = encoding.get_ids().iter().map(|id| i64::from(*id)).collect();
        let class = |(position, (start, end)): (usize, &(usize, usize))| {
            class_of(&(*start..*end), &spans).ok_or_else(|| {
                let token = &encoding.get_tokens()[position];
                said(format!("token {position} ({token:?}) stands for no character of the chat"))
            })
        };
        let classes = encoding.get_offsets().iter().enumerate().map(class).collect::<Result<_>>()?;
        let offsets = encoding.get_offsets().iter().map(|(start, end)| *start..*end).collect();
        let end = ids.len();
        Ok(Sequence { ids, classes, completion: end..end, content_end: end, text, offsets })
    }
}

const HI: [Turn<'static>; 1] = [Turn { role: Role::User, content: "hi" }];

/// The text that the template writes between the assistant's header and the answer.
fn before_the_answer(template: &Template) -> Result<String> {
    let (chat, asked) = (template.render(&HI, false)?, template.render(&HI, true)?);
    let think = asked.strip_prefix(&chat).and_then(|rest| rest.strip_prefix("<|im_start|>assistant\n"));
    Ok(think.unwrap_or_default().to_owned())
}

/// A tokenizer error with this message.
fn said(problem: impl Display) -> Error {
    Error::Tokenizer { problem: problem.to_string() }
}

#[cfg(test)]
mod tests;
