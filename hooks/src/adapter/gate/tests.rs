use super::*;
use crate::chat::tokens::{Selection, TokenClass};

fn gate(text: &str) -> Gate {
    text.parse().unwrap()
}

/// A prompt without a system turn, `user` `Qwen, Qwen` `assistant` `\n`. The text is three tokens; the second token has
/// the end of the first "Qwen" and all of the second "Qwen".
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
fn blocks_projections_and_doses_make_a_region() {
    let doses = |text: &str| gate(text).spread(&[vec![1.0; 5]], Device::Cpu).unwrap();
    let only = doses("only:entity*layers(0..2)*modules(q,v)");
    assert!(matches!(only.at(1, Proj::V), crate::adapter::dose::Dose::Tokens(_)));
    for (layer, proj) in [(2, Proj::V), (1, Proj::K)] {
        assert!(matches!(only.at(layer, proj), crate::adapter::dose::Dose::Uniform(0.0)), "{layer} {proj}");
    }
    let except = doses("except:entity*layers(0..2)*0.5");
    assert!(matches!(except.at(2, Proj::V), crate::adapter::dose::Dose::Uniform(0.5)), "outside of the region");
    assert_eq!(gate("only:entity*0.5").inside(true), 0.5);
    assert_eq!(gate("except:entity*-2").inside(false), -2.0);
    assert!(gate("everywhere*0").is_nowhere() && !gate("everywhere*0.5").is_everywhere());
}

#[test]
fn a_gate_tells_its_blocks_projections_and_dose() {
    let gate = |text: &str| text.parse::<Gate>().unwrap();
    let parts = |text: &str| (gate(text).layers(4), gate(text).modules().len(), gate(text).dose());
    assert_eq!(parts("everywhere*0.5"), (vec![0, 1, 2, 3], 7, 0.5));
    assert_eq!(parts("only:entity*layers(1,3)*modules(qk)*-2"), (vec![1, 3], 2, -2.0));
    assert_eq!(parts("except:layers(0..2)"), (vec![0, 1], 7, 1.0));
    assert_eq!(gate("only:entity*0.5").with_dose(1.0).to_string(), "only:entity");
}
