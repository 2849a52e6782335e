//! At which tokens the adapter acts: `everywhere`, `nowhere`, `only:CLASS[+CLASS]`, `except:CLASS[+CLASS]`.
//!
//! A gate is data, so that it can stand in a config, on a command line and in a CSV. While decoding, generated tokens
//! follow the tokens that were not named, unless `gen` is named itself (alone or through `assistant`).

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
}

impl Gate {
    /// How a gate is written, for help texts.
    pub const SYNTAX: &'static str = "everywhere, nowhere, only:CLASS[+CLASS] or except:CLASS[+CLASS]";

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
        Ok(prompt.classes.iter().map(|class| self.acts_at(*class)).collect())
    }

    /// Whether the adapter acts at the tokens that are generated after a prompt.
    pub fn on_generated(&self) -> bool {
        self.acts_at(TokenClass::Gen)
    }

    /// True for the plain student.
    pub fn is_everywhere(&self) -> bool {
        *self == Self::Everywhere
    }

    /// True for the base model.
    pub fn is_nowhere(&self) -> bool {
        *self == Self::Nowhere
    }

    /// Whether the adapter acts at a token of this class.
    pub fn acts_at(&self, class: TokenClass) -> bool {
        match self {
            Self::Everywhere => true,
            Self::Nowhere => false,
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
            Some(("only", names)) => Ok(Self::Only(names.parse()?)),
            Some(("except", names)) => Ok(Self::Except(names.parse()?)),
            _ => Err(unknown("gate", text, &["everywhere", "nowhere", "only:CLASS[+CLASS]", "except:CLASS[+CLASS]"])),
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
