//! Where and how strongly an adapter acts: tokens × blocks × projections × a dose. A gate is data, so a config, a
//! command line and a CSV can hold it.
//!
//! ```text
//! everywhere                                the plain student
//! nowhere                                   the base
//! only:entity                               at these tokens alone
//! except:template                           at all tokens but these
//! only:"Qwen"#2*layers(0..12)*modules(q,k)  in the cell of tokens, blocks and projections alone
//! except:entity*layers(0..12)               everywhere outside of that cell
//! only:not(entity)*layers(0..12)            in these blocks, at all tokens but these
//! only:modules(attention)*0.5               half as strongly, and in attention alone
//! ```
//!
//! `select.rs` says how tokens are named; a part that is left out means all. While decoding, a generated token counts
//! as not named, unless the gate names `gen` or its id: `only:entity` answers with the adapter off, `only:entity+gen`
//! with it on.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::adapter::dose::Doses;
use crate::adapter::lora::{Adapter, LoraConfig};
use crate::chat::select::{Numbers, Tokens, argument, split};
use crate::chat::tokens::{Sequence, unknown};
use crate::error::{Error, Result};
use crate::proj::Proj;

/// Where and how strongly an adapter acts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Gate {
    reach: Reach,
    /// The factor on the adapter's output where it acts.
    dose: f64,
}

#[derive(Clone, Debug, PartialEq)]
enum Reach {
    Everywhere,
    Nowhere,
    Only(Cell),
    Except(Cell),
}

/// Tokens × blocks × projections; `None` is all.
#[derive(Clone, Debug, Default, PartialEq)]
struct Cell {
    tokens: Option<Tokens>,
    layers: Option<Numbers>,
    modules: Option<BTreeSet<Proj>>,
}

/// Names for several projections.
const MODULES: [(&str, &[Proj]); 3] = [
    ("attention", &[Proj::Q, Proj::K, Proj::V, Proj::O]),
    ("mlp", &[Proj::Gate, Proj::Up, Proj::Down]),
    ("qk", &[Proj::Q, Proj::K]),
];

impl Default for Gate {
    fn default() -> Self {
        Self::EVERYWHERE
    }
}

impl Gate {
    /// The plain student.
    pub const EVERYWHERE: Self = Self { reach: Reach::Everywhere, dose: 1.0 };

    /// The base.
    pub const NOWHERE: Self = Self { reach: Reach::Nowhere, dose: 1.0 };

    /// How a gate is written, for help texts.
    pub const SYNTAX: &'static str = "everywhere, nowhere, only:TOKENS or except:TOKENS, and after it any of *layers(0..12), \
                                      *modules(q,k,v) and *0.5; TOKENS: a class, \"text\", ids(..), positions(..), joined by +";

    /// Acts at these tokens alone.
    pub fn only(tokens: impl Into<Tokens>) -> Self {
        Self { reach: Reach::Only(Cell { tokens: Some(tokens.into()), ..Cell::default() }), dose: 1.0 }
    }

    /// Acts at all tokens but these.
    pub fn except(tokens: impl Into<Tokens>) -> Self {
        Self { reach: Reach::Except(Cell { tokens: Some(tokens.into()), ..Cell::default() }), dose: 1.0 }
    }

    /// True for the plain student.
    pub fn is_everywhere(&self) -> bool {
        *self == Self::EVERYWHERE
    }

    /// True for the base model.
    pub fn is_nowhere(&self) -> bool {
        self.reach == Reach::Nowhere || self.dose == 0.0
    }

    /// True where the gate does not ask which token it is at.
    pub fn is_blind(&self) -> bool {
        self.cell().is_none_or(|cell| cell.tokens.is_none())
    }

    /// Whether one pass can apply both gates, each at its own tokens: they have the same blocks and projections, and
    /// one dose in all others.
    pub(crate) fn fits(&self, other: &Self) -> bool {
        let place = |gate: &Self| {
            let Cell { layers, modules, .. } = gate.cell().cloned().unwrap_or_default();
            let elsewhere = (layers.is_some() || modules.is_some()).then(|| gate.elsewhere());
            (layers, modules, elsewhere)
        };
        place(self) == place(other)
    }

    /// Per token of the row `[pos]`: true where the adapter acts in any block and projection. Tokens that the row does not
    /// have are an error, for they would measure nothing.
    pub fn acts(&self, row: &Sequence) -> Result<Vec<bool>> {
        Ok(self.doses(row)?.into_iter().map(|dose| dose != 0.0 || self.acts_elsewhere()).collect())
    }

    /// Whether the adapter acts at all tokens in the blocks and projections outside the gate's.
    pub fn acts_elsewhere(&self) -> bool {
        let leaves_out = self.cell().is_some_and(|cell| cell.layers.is_some() || cell.modules.is_some());
        leaves_out && self.elsewhere() != 0.0
    }

    /// Per token of the row `[pos]`: the factor on the adapter's output in the gate's blocks and projections.
    pub fn doses(&self, row: &Sequence) -> Result<Vec<f64>> {
        let chosen = match self.cell().and_then(|cell| cell.tokens.as_ref()) {
            Some(tokens) => tokens.among(row, &format_args!("gate {self}"))?,
            None => vec![true; row.ids.len()],
        };
        Ok(chosen.into_iter().map(|chosen| self.inside(chosen)).collect())
    }

    /// The factor at a token that was generated after a prompt, in the gate's blocks and projections.
    pub fn generated(&self, id: i64) -> f64 {
        let chosen = self.cell().and_then(|cell| cell.tokens.as_ref()).is_none_or(|tokens| tokens.has_generated(id));
        self.inside(chosen)
    }

    /// Whether the gate itself decides about generated tokens, which otherwise count as not named.
    pub fn names_generated(&self) -> bool {
        self.cell().and_then(|cell| cell.tokens.as_ref()).is_some_and(Tokens::names_generated)
    }

    /// The policy for generated tokens, for a table: `named` by the gate, `same_as_unselected`, or, if the gate names
    /// no tokens or all but some, `on` or `off`.
    pub fn decode_policy(&self) -> &'static str {
        let unselected =
            self.cell().is_none_or(|cell| cell.tokens.as_ref().is_some_and(|tokens| !tokens.has_generated(i64::MIN)));
        match (self.names_generated(), unselected) {
            (true, _) => "named",
            (false, true) => "same_as_unselected",
            (false, false) if self.generated(i64::MIN) != 0.0 || self.acts_elsewhere() => "on",
            (false, false) => "off",
        }
    }

    /// The factor at generated tokens; `None` where it depends on their ids, or on the block and projection.
    pub fn decode_dose(&self) -> Option<f64> {
        let by_id = self.cell().and_then(|cell| cell.tokens.as_ref()).is_some_and(Tokens::names_ids);
        (!by_id && !self.acts_elsewhere()).then(|| self.generated(i64::MIN))
    }

    /// Refuses blocks that the adapter's model does not have, and a gate that hits none of the adapter's pairs.
    pub fn check(&self, adapter: &Adapter) -> Result<()> {
        let places: Vec<(usize, Proj)> = adapter.pairs().map(|(layer, proj, _)| (layer, proj)).collect();
        self.check_places(adapter.n_layers(), &places)
    }

    /// Checks the gate against an adapter's settings, before the adapter exists.
    pub fn check_planned(&self, lora: &LoraConfig, n_layers: usize) -> Result<()> {
        let layers = lora.layers.clone().unwrap_or_else(|| (0..n_layers).collect());
        let modules = |layer: usize| lora.target_modules.iter().map(move |proj| (layer, *proj));
        self.check_places(n_layers, &layers.into_iter().flat_map(modules).collect::<Vec<_>>())
    }

    fn check_places(&self, n_layers: usize, places: &[(usize, Proj)]) -> Result<()> {
        let Some(cell) = self.cell() else { return Ok(()) };
        if let Some(layers) = &cell.layers
            && let Some(beyond) = layers.first_outside(n_layers)
        {
            return Err(Error::Invalid {
                what: format!("block {beyond} of gate {self}"),
                expected: format!("one of the model's {n_layers}, 0 to {}", n_layers.saturating_sub(1)),
                found: "beyond them".to_owned(),
            });
        }
        if places.iter().any(|(layer, proj)| cell.contains(*layer, *proj)) {
            return Ok(());
        }
        let has: BTreeSet<&str> = places.iter().map(|(_, proj)| proj.name()).collect();
        Err(Error::Invalid {
            what: format!("what gate {self} selects of the adapter"),
            expected: format!(
                "at least one of its pairs, which are at {}",
                has.into_iter().collect::<Vec<_>>().join(", ")
            ),
            found: "none".to_owned(),
        })
    }

    /// The doses of some rows, as a pass takes them; rows may be cut to their first tokens. `rows[row][pos]`, from `doses`.
    pub fn spread(&self, rows: &[Vec<f64>], device: Device) -> Result<Doses> {
        let width = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut values = vec![0_f64; rows.len() * width];
        for (row, padded) in rows.iter().zip(values.chunks_mut(width.max(1))) {
            padded[..row.len()].copy_from_slice(row);
        }
        let tokens =
            Tensor::f_from_slice(&values)?.f_view([rows.len() as i64, width as i64, 1])?.f_to_device(device)?;
        let Cell { layers, modules, .. } = self.cell().cloned().unwrap_or_default();
        Ok(Doses { tokens, layers, modules, elsewhere: self.elsewhere() })
    }

    /// Whether the dose is another than 1, exactly.
    #[expect(clippy::float_cmp, reason = "a dose that is written is compared as it is written")]
    fn has_dose(&self) -> bool {
        self.dose != 1.0
    }

    fn cell(&self) -> Option<&Cell> {
        match &self.reach {
            Reach::Everywhere | Reach::Nowhere => None,
            Reach::Only(cell) | Reach::Except(cell) => Some(cell),
        }
    }

    /// The factor inside of the gate's blocks and projections, at a token that was chosen or not.
    fn inside(&self, chosen: bool) -> f64 {
        let acts = match self.reach {
            Reach::Everywhere => true,
            Reach::Nowhere => false,
            Reach::Only(_) => chosen,
            Reach::Except(_) => !chosen,
        };
        if acts { self.dose } else { 0.0 }
    }

    /// The factor outside of the gate's blocks and projections.
    fn elsewhere(&self) -> f64 {
        if matches!(self.reach, Reach::Everywhere | Reach::Except(_)) { self.dose } else { 0.0 }
    }
}

impl Cell {
    fn contains(&self, layer: usize, proj: Proj) -> bool {
        self.layers.as_ref().is_none_or(|layers| layers.contains(layer as i64))
            && self.modules.as_ref().is_none_or(|modules| modules.contains(&proj))
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut factors: Vec<String> = match &self.reach {
            Reach::Everywhere => vec!["everywhere".to_owned()],
            Reach::Nowhere => vec!["nowhere".to_owned()],
            Reach::Only(cell) | Reach::Except(cell) => cell.factors(),
        };
        factors.extend(self.has_dose().then(|| self.dose.to_string()));
        let kind = match &self.reach {
            Reach::Only(_) => "only:",
            Reach::Except(_) => "except:",
            Reach::Everywhere | Reach::Nowhere => "",
        };
        f.pad(&format!("{kind}{}", factors.join("*")))
    }
}

impl Cell {
    fn factors(&self) -> Vec<String> {
        let modules = self.modules.as_ref().map(|modules| {
            let names: Vec<_> = modules.iter().map(|proj| short(*proj)).collect();
            format!("modules({})", names.join(","))
        });
        let layers = self.layers.as_ref().map(|layers| format!("layers({layers})"));
        let tokens = self.tokens.as_ref().map(ToString::to_string);
        tokens.into_iter().chain(layers).chain(modules).collect()
    }
}

impl FromStr for Gate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let factors = split(text, &['*', '×'])?;
        let (kind, first) = match factors[0].split_once(':') {
            Some((kind @ ("only" | "except"), first)) => (kind, first.trim()),
            _ => (factors[0].trim(), ""),
        };
        let twice = |what: &str| Error::Invalid {
            what: format!("gate {text}"),
            expected: format!("{what} once"),
            found: "twice".to_owned(),
        };
        let (mut cell, mut dose) = (Cell::default(), None);
        for (at, factor) in std::iter::once(first).chain(factors[1..].iter().map(|factor| factor.trim())).enumerate() {
            if let Some(inside) = argument(factor, "layers") {
                ensure_new(cell.layers.replace(Numbers::parse(inside, "the layers of a gate")?), || twice("layers"))?;
            } else if let Some(inside) = argument(factor, "modules") {
                ensure_new(cell.modules.replace(modules(inside)?), || twice("modules"))?;
            } else if let Ok(number) = factor.parse::<f64>() {
                ensure_new(dose.replace(number), || twice("a dose"))?;
            } else if at == 0 && !first.is_empty() {
                cell.tokens = Some(factor.parse()?);
            } else if at > 0 {
                return Err(unknown("factor of a gate", factor, &["layers(0..12)", "modules(q,k,v)", "0.5"]));
            }
        }
        let dose = dose.unwrap_or(1.0);
        if !(dose as f32).is_finite() {
            let (what, expected) = (format!("the dose of gate {text}"), "a number that f32 can hold".to_owned());
            return Err(Error::Invalid { what, expected, found: dose.to_string() });
        }
        let reach = match kind {
            "everywhere" if cell == Cell::default() => Reach::Everywhere,
            "nowhere" if factors.len() == 1 => Reach::Nowhere,
            "only" if cell != Cell::default() => Reach::Only(cell),
            "except" if cell != Cell::default() => Reach::Except(cell),
            _ => {
                let choices = [
                    "everywhere",
                    "everywhere*0.5",
                    "nowhere",
                    "only:CLASS[+CLASS]",
                    "except:CLASS[+CLASS]",
                    "only:\"text\"",
                ];
                let more =
                    ["only:positions(0..6,-1)", "only:ids(151644)", "only:CLASS*layers(0..12)*modules(q,k,v)*0.5"];
                return Err(unknown("gate", text, &[&choices[..], &more[..]].concat()));
            }
        };
        Ok(Self { reach, dose })
    }
}

/// An error where there was something before.
fn ensure_new<T>(before: Option<T>, error: impl FnOnce() -> Error) -> Result<()> {
    before.map_or(Ok(()), |_| Err(error()))
}

/// Projections by their short names, their names in transformers, or a name for several.
fn modules(text: &str) -> Result<BTreeSet<Proj>> {
    let mut found = BTreeSet::new();
    for name in text.split(',').map(str::trim) {
        let several = MODULES.iter().find(|(known, _)| *known == name);
        let one = Proj::ALL.into_iter().find(|proj| proj.name() == name || short(*proj) == name);
        match (several, one) {
            (Some((_, several)), _) => found.extend(*several),
            (_, Some(one)) => {
                found.insert(one);
            }
            _ => {
                let short = Proj::ALL.into_iter().map(short).chain(MODULES.map(|(name, _)| name));
                return Err(unknown("module of a gate", name, &short.collect::<Vec<_>>()));
            }
        }
    }
    Ok(found)
}

/// `q` for `q_proj`.
fn short(proj: Proj) -> &'static str {
    proj.name().trim_end_matches("_proj")
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
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::float_cmp)]
mod tests {
    use super::*;
    use crate::chat::tokens::{Selection, TokenClass};

    fn gate(text: &str) -> Gate {
        text.parse().unwrap()
    }

    /// A prompt without a system turn, `user` `Qwen, Qwen` `assistant` `\n`. The text is three tokens; the second one
    /// has the end of the first "Qwen" and all of the second.
    fn prompt() -> Sequence {
        use TokenClass::{AsstNl, AsstRole, UserContent, UserRole};
        let text = "userQwen, Qwenassistant\n".to_owned();
        let offsets = vec![0..4, 4..7, 7..14, 14..23, 23..24];
        let classes = vec![UserRole, UserContent, UserContent, AsstRole, AsstNl];
        Sequence { ids: vec![1, 2, 3, 4, 5], classes, completion: 5..5, content_end: 5, text, offsets }
    }

    fn acts(text: &str) -> Vec<bool> {
        gate(text).acts(&prompt()).unwrap()
    }

    #[test]
    fn a_gate_acts_where_it_says() {
        assert_eq!(acts("everywhere"), [true; 5]);
        assert_eq!(acts("nowhere"), [false; 5]);
        assert_eq!(acts("only:user"), [true, true, true, false, false]);
        assert_eq!(acts("except:user"), [false, false, false, true, true]);
        assert_eq!(acts("only:user.content+asst.nl"), [false, true, true, false, true]);
        assert_eq!(acts("only:template"), [true, false, false, true, true]);
        assert_eq!(acts("except:template"), [false, true, true, false, false]);
        assert_eq!(acts("only:asst.header"), [false, false, false, true, true]);
        assert_eq!(acts("only:not(template)"), acts("except:template"));
        assert_eq!(acts("except:not(template)"), acts("only:template"));
    }

    #[test]
    fn a_text_is_found_at_every_place_or_at_the_nth() {
        let offsets = vec![0..4, 4..7, 7..9, 9..14, 14..23, 23..24]; // user|Qwe|n,| Qwen|assistant|\n
        let row = Sequence { ids: vec![1, 2, 3, 4, 5, 6], offsets, completion: 6..6, ..prompt() };
        let acts = |text: &str| gate(text).acts(&row).unwrap();
        assert_eq!(acts("only:\"Qwen\""), [false, true, true, true, false, false]);
        assert_eq!(acts("only:\"Qwen\"#2"), [false, false, false, true, false, false]);
        assert_eq!(acts("except:\"Qwen\"#1"), [true, false, false, true, true, true], "the first is in two tokens");
        assert_eq!(acts("only:\"\\n\"+ids(1)"), [true, false, false, false, false, true]);
        for (text, reason) in [
            ("only:\"qwen\"", "the text \"qwen\" does not stand in it"),
            ("except:\"Qwen\"#3", "of the text \"Qwen\" it holds 2, not 3"),
            ("only:ids(9,12..14)", "none of its 6 tokens has one of the ids 9,12..14"),
            ("only:\"Qwen\"+ids(9)", "none of its 6 tokens has one of the ids 9"),
        ] {
            let message = gate(text).acts(&row).unwrap_err().to_string();
            assert_eq!(message, format!("gate {text} selects no token of the prompt; {reason}"));
        }
        let by_ids = Sequence { text: String::new(), offsets: vec![], ..row };
        let message = gate("only:\"Qwen\"").acts(&by_ids).unwrap_err().to_string();
        assert!(message.contains("given by its ids"), "{message}");
    }

    #[test]
    fn places_of_a_text_may_overlap_and_no_other_token_is_left_by_all() {
        let offsets = (0..7).map(|at| at..at + 1).collect();
        let text = "1, 1, 1".to_owned();
        let row = Sequence { text, offsets, ..Sequence::of_ids(vec![1, 2, 3, 1, 2, 3, 1]) };
        let acts = |text: &str| gate(text).acts(&row).unwrap();
        assert_eq!(acts("only:\"1, 1\""), [true; 7]);
        assert_eq!(acts("only:\"1, 1\"#2"), [false, false, false, true, true, true, true]);
        let message = gate("only:not(user+gen)").acts(&row).unwrap_err().to_string();
        assert!(message.ends_with("not(user+gen) leaves none over"), "{message}");
        assert_eq!(gate("only:not(user)").acts(&row).unwrap(), [false; 7], "generated tokens are left over");
    }

    #[test]
    fn texts_and_positions_are_the_prompts_and_ids_are_the_rows() {
        let row = prompt().with_completion(&[3, 9]);
        let acts = |text: &str| gate(text).acts(&row).unwrap();
        assert_eq!(acts("only:ids(3)"), [false, false, true, false, false, true, false]);
        assert_eq!(acts("only:\"Qwen\""), [false, true, true, false, false, false, false]);
        assert_eq!(acts("only:positions(-1)"), [false, false, false, false, true, false, false]);
        assert_eq!(acts("except:positions(-1)"), [true, true, true, true, false, true, true]);
        let generated = |text: &str| [3, 9].map(|id| gate(text).generated(id));
        assert_eq!(generated("only:ids(3)"), [1.0, 0.0]);
        assert_eq!(generated("except:ids(3)*0.5"), [0.0, 0.5]);
        assert!(gate("only:ids(3)").names_generated() && !gate("only:\"Qwen\"").names_generated());
    }

    #[test]
    fn positions_count_from_either_end() {
        assert_eq!(acts("only:positions(0..2,-1)"), [true, true, false, false, true]);
        assert_eq!(acts("except:positions(2)"), [true, true, false, true, true]);
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
        for text in ["only:positions(5)", "except:positions(-6)", "only:user+positions(7)"] {
            let message = gate(text).acts(&prompt()).unwrap_err().to_string();
            assert!(message.contains("0 to 4"), "{message}");
        }
    }

    #[test]
    fn only_and_except_are_complements() {
        let rows = [prompt(), prompt().with_completion(&[3, 9])];
        let texts = ["\"Qwen\"", "ids(2,3)", "positions(1)", "not(user)+ids(2)"];
        for name in Selection::choices().into_iter().chain(texts) {
            let Ok(only) = format!("only:{name}").parse::<Gate>() else { continue };
            let except = gate(&format!("except:{name}"));
            for row in &rows {
                let (Ok(only), Ok(except)) = (only.acts(row), except.acts(row)) else { continue };
                assert!(only.iter().zip(&except).all(|(only, except)| only != except), "{name}");
            }
            assert_ne!(only.generated(3), except.generated(3), "{name}");
        }
    }

    #[test]
    fn generated_tokens_follow_those_not_named() {
        let on = |text: &str| gate(text).generated(7) == 1.0;
        assert!(on("everywhere") && !on("nowhere"));
        assert!(!on("only:entity") && on("except:entity"));
        assert!(on("only:gen") && !on("except:gen"));
        assert!(on("only:assistant") && !on("except:assistant"));
        assert!(!on("only:template") && on("except:template"));
        assert!(!on("only:positions(-1)") && on("except:positions(0)") && on("only:not(entity)"));
        assert!(on("only:layers(0..2)"), "all tokens of these blocks");
        assert_eq!(gate("everywhere*0.25").generated(7), 0.25);
        assert_eq!(gate("only:entity").decode_policy(), "same_as_unselected");
        assert_eq!(gate("only:entity+gen").decode_policy(), "named");
        for (text, policy, dose) in [
            ("only:not(entity)", "on", Some(1.0)),
            ("except:not(entity)", "off", Some(0.0)),
            ("only:layers(0)", "on", Some(1.0)),
            ("except:layers(0)", "on", None),
            ("except:entity+gen*layers(0)", "named", None),
            ("everywhere*0.1", "same_as_unselected", Some(0.1)),
            ("only:ids(3)", "named", None),
        ] {
            assert_eq!((gate(text).decode_policy(), gate(text).decode_dose()), (policy, dose), "{text}");
        }
        assert_eq!(acts("except:user*layers(0)"), [true; 5], "in the other blocks");
        assert_eq!(acts("only:user*layers(0)"), acts("only:user"));
    }

    #[test]
    fn a_gate_that_selects_nothing_says_what_there_is() {
        for text in ["only:entity", "except:entity", "only:entity+gen", "only:system", "only:entity*layers(0)*2"] {
            let message = gate(text).acts(&prompt()).unwrap_err().to_string();
            assert!(message.contains(text), "{message}");
            assert!(message.ends_with("user.role, user.content, asst.role, asst.nl"), "{message}");
        }
        assert_eq!(acts("only:gen"), [false; 5]);
        assert_eq!(acts("only:entity+user"), [true, true, true, false, false]);
    }

    #[test]
    fn blocks_projections_and_doses_make_a_cell() {
        let doses = |text: &str| gate(text).spread(&[vec![1.0; 5]], Device::Cpu).unwrap();
        let only = doses("only:entity*layers(0..2)*modules(q,v)");
        assert!(matches!(only.at(1, Proj::V), crate::adapter::dose::Dose::Tokens(_)));
        for (layer, proj) in [(2, Proj::V), (1, Proj::K)] {
            assert!(matches!(only.at(layer, proj), crate::adapter::dose::Dose::Uniform(0.0)), "{layer} {proj}");
        }
        let except = doses("except:entity*layers(0..2)*0.5");
        assert!(matches!(except.at(2, Proj::V), crate::adapter::dose::Dose::Uniform(0.5)), "outside of the cell");
        assert_eq!(gate("only:entity*0.5").inside(true), 0.5);
        assert_eq!(gate("except:entity*-2").inside(false), -2.0);
        assert!(gate("everywhere*0").is_nowhere() && !gate("everywhere*0.5").is_everywhere());
    }

    #[test]
    fn the_text_is_read_back() {
        for text in [
            "everywhere",
            "nowhere",
            "everywhere*0.5",
            "only:template",
            "except:entity+user.content",
            "only:gen",
            "only:\"Qwen\"",
            "except:\"a\\\"b\\\\+*\\n\"#2+entity",
            "only:ids(5,151644)+positions(0..6,-1)",
            "only:not(entity)*layers(0..12)*modules(q,k,v)*0.5",
            "except:layers(3)",
            "only:modules(gate,up,down)*-1.5",
        ] {
            assert_eq!(gate(text).to_string(), text);
            assert_eq!(gate(&gate(text).to_string()), gate(text));
            let json = serde_json::to_string(&text).unwrap();
            assert_eq!(serde_json::to_string(&gate(text)).unwrap(), json);
            assert_eq!(serde_json::from_str::<Gate>(&json).unwrap(), gate(text));
        }
        for (text, back) in [
            ("only:user+user", "only:user"),
            (" only: user + gen × 0.5 × layers(0,1) ", "only:user+gen*layers(0..2)*0.5"),
            ("only:modules(mlp,q_proj)", "only:modules(q,gate,up,down)"),
            ("only:modules(qk)", "only:modules(q,k)"),
        ] {
            assert_eq!(gate(text).to_string(), back);
        }
        assert!(Gate::default().is_everywhere() && gate("nowhere").is_nowhere());
    }

    #[test]
    fn a_misspelt_gate_is_told_the_nearest() {
        let message = |text: &str| text.parse::<Gate>().unwrap_err().to_string();
        assert!(message("everywere").ends_with("the nearest is everywhere"), "{}", message("everywere"));
        assert!(message("only:qwen").ends_with("asst.think, gen"), "{}", message("only:qwen"));
        assert!(message("only:templat").ends_with("the nearest is template"), "{}", message("only:templat"));
        assert!(message("only:modules(qq,v)").contains("module of a gate \"qq\""), "{}", message("only:modules(qq,v)"));
        assert!(message("only:entity*layer(0)").contains("layers(0..12)"), "{}", message("only:entity*layer(0)"));
        for text in [
            "",
            "only",
            "only:",
            "only:user+",
            "except: ",
            "Everywhere",
            "all",
            "only:\"",
            "only:\"\"",
            "only:\"a\"#0",
            "only:\"a\"b",
            "only:user*2*3",
            "only:layers()",
            "only:layers(0)*layers(1)",
            "nowhere*2",
            "everywhere*layers(0)",
            "only:user*inf",
            "only:user*1e39",
            "only:\"a\\x\"",
            "only:ids(a)",
            "only:user*NaN",
            "only:0.5*user",
            "only:not(user",
        ] {
            assert!(text.parse::<Gate>().is_err(), "{text:?}");
        }
    }
}
