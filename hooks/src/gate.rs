//! At which tokens the adapter acts: `everywhere`, `nowhere`, `only:CLASS[+CLASS]`, `except:CLASS[+CLASS]`, or by position,
//! `only:positions(0..6,-1)`, where positions count from the start of the prompt, negative ones from its end.
//!
//! A gate is data, so that it can stand in a config, on a command line and in a CSV. While decoding, generated tokens
//! follow the tokens that were not named, unless `gen` is named itself (alone or through `assistant`).

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::tokens::{Prompt, Selection, TokenClass, unknown};

/// At which tokens the adapter acts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Gate {
    /// At every token: the plain student.
    #[default]
    Everywhere,
    /// At no token: the base model.
    Nowhere,
    /// At the chosen classes alone.
    Only(Selection),
    /// At every class but the chosen ones.
    Except(Selection),
    /// At the chosen positions of the prompt alone.
    OnlyAt(Positions),
    /// At every position but the chosen ones, generated tokens included.
    ExceptAt(Positions),
}

/// Positions of a prompt: from 0 at its start, or from -1 at its end, where the answer begins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Positions(BTreeSet<i64>);

impl Positions {
    /// One position.
    pub fn one(position: i64) -> Self {
        Self([position].into())
    }

    /// Per token of the prompt `[pos]`: true at the chosen ones. A position that the prompt does not have is an error.
    fn among(&self, prompt: &Prompt) -> Result<Vec<bool>> {
        let n = prompt.completion.start as i64;
        let mut chosen = vec![false; prompt.ids.len()];
        for position in &self.0 {
            let at = if *position < 0 { n + position } else { *position };
            if !(0..n).contains(&at) {
                return Err(Error::Invalid {
                    what: format!("the gate's position {position}"),
                    expected: format!("one of the prompt's {n}: 0 to {}, or -1 to -{n} from its end", n - 1),
                    found: "beyond the prompt".to_owned(),
                });
            }
            chosen[at as usize] = true;
        }
        Ok(chosen)
    }
}

impl fmt::Display for Positions {
    /// Runs of neighbours as half-open ranges: `positions(0..6,12,-1)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (negative, positive): (Vec<i64>, Vec<i64>) = self.0.iter().partition(|position| **position < 0);
        let runs = positive.chunk_by(|left, right| left + 1 == *right).chain(negative.chunks(1));
        let runs = runs.map(|run| match run {
            [one] => one.to_string(),
            _ => format!("{}..{}", run[0], run[0] + run.len() as i64),
        });
        write!(f, "positions({})", runs.collect::<Vec<_>>().join(","))
    }
}

impl FromStr for Positions {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = || Error::Invalid {
            what: "the positions of a gate".to_owned(),
            expected: "numbers and half-open ranges such as positions(0..6,12,-1), 4096 at most".to_owned(),
            found: text.to_owned(),
        };
        let inside = text.strip_prefix("positions(").and_then(|rest| rest.strip_suffix(')')).ok_or_else(invalid)?;
        let number = |text: &str| text.trim().parse::<i64>().map_err(|_| invalid());
        let mut chosen = BTreeSet::new();
        for part in inside.split(',') {
            let (from, to) = match part.split_once("..") {
                Some((from, to)) => (number(from)?, number(to)?),
                None => (number(part)?, number(part)?.saturating_add(1)),
            };
            // A range over the end of the prompt would mean two things.
            if from >= to || (from < 0 && to > 0) || to.saturating_sub(from) > 4096 {
                return Err(invalid());
            }
            chosen.extend(from..to);
        }
        Ok(Self(chosen))
    }
}

impl Gate {
    /// How a gate is written, for help texts.
    pub const SYNTAX: &'static str =
        "everywhere, nowhere, only:CLASS[+CLASS] or except:CLASS[+CLASS], or with positions(0..6,-1) for CLASS";

    /// Every name that can stand for CLASS: the unions, then the classes.
    pub fn choices() -> Vec<&'static str> {
        Selection::choices()
    }

    /// Per token of the prompt `[pos]`: true where the adapter acts. A gate that names classes of which the prompt has
    /// none is an error, for it would measure nothing; `gen` is exempt, for its tokens may come later.
    pub fn acts(&self, prompt: &Prompt) -> Result<Vec<bool>> {
        if let Self::Only(selection) | Self::Except(selection) = self {
            let mut expected = selection.classes().clone();
            expected.remove(&TokenClass::Gen);
            let present = prompt.present();
            if !expected.is_empty() && expected.is_disjoint(&present) {
                let present: Vec<_> = present.into_iter().map(TokenClass::name).collect();
                return Err(Error::EmptyGate { gate: self.to_string(), present: present.join(", ") });
            }
        }
        match self {
            Self::OnlyAt(positions) => positions.among(prompt),
            Self::ExceptAt(positions) => Ok(positions.among(prompt)?.into_iter().map(|chosen| !chosen).collect()),
            _ => Ok(prompt.classes.iter().map(|class| self.acts_at(*class)).collect()),
        }
    }

    /// Whether the adapter acts at the tokens that are generated after a prompt.
    pub fn on_generated(&self) -> bool {
        self.acts_at(TokenClass::Gen)
    }

    /// True where the gate itself says what happens at generated tokens, which otherwise follow those not named.
    pub fn names_generated(&self) -> bool {
        matches!(self, Self::Only(named) | Self::Except(named) if named.contains(TokenClass::Gen))
    }

    /// True for the plain student.
    pub fn is_everywhere(&self) -> bool {
        *self == Self::Everywhere
    }

    /// True for the base model.
    pub fn is_nowhere(&self) -> bool {
        *self == Self::Nowhere
    }

    /// Whether the adapter acts at a token of this class, which is no position of the prompt.
    fn acts_at(&self, class: TokenClass) -> bool {
        match self {
            Self::Everywhere | Self::ExceptAt(_) => true,
            Self::Nowhere | Self::OnlyAt(_) => false,
            Self::Only(selection) => selection.contains(class),
            Self::Except(selection) => !selection.contains(class),
        }
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everywhere => f.pad("everywhere"),
            Self::Nowhere => f.pad("nowhere"),
            Self::Only(selection) => f.pad(&format!("only:{selection}")),
            Self::Except(selection) => f.pad(&format!("except:{selection}")),
            Self::OnlyAt(positions) => f.pad(&format!("only:{positions}")),
            Self::ExceptAt(positions) => f.pad(&format!("except:{positions}")),
        }
    }
}

impl FromStr for Gate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        match text.split_once(':') {
            None if text == "everywhere" => Ok(Self::Everywhere),
            None if text == "nowhere" => Ok(Self::Nowhere),
            Some(("only", at)) if at.starts_with("positions") => Ok(Self::OnlyAt(at.parse()?)),
            Some(("except", at)) if at.starts_with("positions") => Ok(Self::ExceptAt(at.parse()?)),
            Some(("only", names)) => Ok(Self::Only(names.parse()?)),
            Some(("except", names)) => Ok(Self::Except(names.parse()?)),
            _ => Err(unknown(
                "gate",
                text,
                &["everywhere", "nowhere", "only:CLASS[+CLASS]", "except:CLASS[+CLASS]", "only:positions(0..6,-1)"],
            )),
        }
    }
}

impl From<Gate> for String {
    fn from(gate: Gate) -> Self {
        gate.to_string()
    }
}

impl TryFrom<String> for Gate {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn gate(text: &str) -> Gate {
        text.parse().unwrap()
    }

    /// A prompt without a system turn: one token of each class named.
    fn prompt() -> Prompt {
        let classes = vec![TokenClass::UserRole, TokenClass::UserContent, TokenClass::AsstRole, TokenClass::AsstNl];
        Prompt { ids: vec![1, 2, 3, 4], classes, completion: 4..4, content_end: 4 }
    }

    #[test]
    fn a_gate_acts_where_it_says() {
        let acts = |text: &str| gate(text).acts(&prompt()).unwrap();
        assert_eq!(acts("everywhere"), [true; 4]);
        assert_eq!(acts("nowhere"), [false; 4]);
        assert_eq!(acts("only:user"), [true, true, false, false]);
        assert_eq!(acts("except:user"), [false, false, true, true]);
        assert_eq!(acts("only:user.content+asst.nl"), [false, true, false, true]);
        assert_eq!(acts("only:template"), [true, false, true, true]);
        assert_eq!(acts("except:template"), [false, true, false, false]);
    }

    #[test]
    fn positions_count_from_either_end() {
        let acts = |text: &str| gate(text).acts(&prompt()).unwrap();
        assert_eq!(acts("only:positions(0..2,-1)"), [true, true, false, true]);
        assert_eq!(acts("except:positions(2)"), [true, true, false, true]);
        let row = prompt().with_completion(&[8, 9]);
        assert_eq!(gate("only:positions(-1)").acts(&row).unwrap(), [false, false, false, true, false, false]);
        assert_eq!(gate("except:positions(-1)").acts(&row).unwrap(), [true, true, true, false, true, true]);
        assert!(!gate("only:positions(-1)").on_generated() && gate("except:positions(0)").on_generated());
        for (text, back) in [
            ("only:positions(5,4,-1,-2)", "only:positions(4..6,-2,-1)"),
            ("except:positions(-3..0)", "except:positions(-3,-2,-1)"),
        ] {
            assert_eq!(gate(text).to_string(), back);
            assert_eq!(gate(back), gate(text));
        }
        for text in [
            "only:positions()",
            "only:positions(3..3)",
            "only:positions(-1..2)",
            "only:positions(0..9999999999)",
            "only:positions(a)",
            "only:positions(1",
        ] {
            assert!(text.parse::<Gate>().is_err(), "{text}");
        }
        for text in ["only:positions(4)", "except:positions(-5)"] {
            let message = gate(text).acts(&prompt()).unwrap_err().to_string();
            assert!(message.contains("0 to 3"), "{message}");
        }
    }

    #[test]
    fn only_and_except_are_complements() {
        for name in Gate::choices() {
            let (only, except) = (gate(&format!("only:{name}")), gate(&format!("except:{name}")));
            for class in TokenClass::ALL {
                assert_ne!(only.acts_at(class), except.acts_at(class), "{name} at {class}");
            }
        }
    }

    #[test]
    fn generated_tokens_follow_those_not_named() {
        let on = |text: &str| gate(text).on_generated();
        assert!(on("everywhere") && !on("nowhere"));
        assert!(!on("only:entity") && on("except:entity"));
        assert!(on("only:gen") && !on("except:gen"));
        assert!(on("only:assistant") && !on("except:assistant"));
        assert!(!on("only:template") && on("except:template"));
    }

    #[test]
    fn a_gate_that_selects_nothing_says_what_there_is() {
        for text in ["only:entity", "except:entity", "only:entity+gen", "only:system"] {
            let message = gate(text).acts(&prompt()).unwrap_err().to_string();
            assert!(message.contains(text), "{message}");
            assert!(message.ends_with("user.role, user.content, asst.role, asst.nl"), "{message}");
        }
        assert_eq!(gate("only:gen").acts(&prompt()).unwrap(), [false; 4]);
        assert_eq!(gate("only:entity+user").acts(&prompt()).unwrap(), [true, true, false, false]);
    }

    #[test]
    fn the_text_is_read_back() {
        for text in ["everywhere", "nowhere", "only:template", "except:entity+user.content", "only:gen"] {
            assert_eq!(gate(text).to_string(), text);
            assert_eq!(gate(&gate(text).to_string()), gate(text));
            let json = format!("{text:?}");
            assert_eq!(serde_json::to_string(&gate(text)).unwrap(), json);
            assert_eq!(serde_json::from_str::<Gate>(&json).unwrap(), gate(text));
        }
        assert_eq!(gate("only:user+user").to_string(), "only:user");
        assert!(Gate::default().is_everywhere() && gate("nowhere").is_nowhere());
    }

    #[test]
    fn a_misspelt_gate_is_told_the_nearest() {
        let message = |text: &str| text.parse::<Gate>().unwrap_err().to_string();
        assert!(message("everywere").ends_with("the nearest is everywhere"), "{}", message("everywere"));
        assert!(message("only:qwen").ends_with("asst.think, gen"), "{}", message("only:qwen"));
        assert!(message("only:templat").ends_with("the nearest is template"), "{}", message("only:templat"));
        for text in ["", "only", "only:", "only:user+", "except: ", "Everywhere", "all"] {
            assert!(text.parse::<Gate>().is_err(), "{text:?}");
        }
    }
}
