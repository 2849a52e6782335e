//! The model's own chat template, rendered as transformers renders it: Jinja with trimmed blocks and Python's methods.
//!
//! The engine returns text only, not which part wrote it. So chats are rendered by `chat.rs` and compared with this
//! rendering. Tools are never passed.

use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;

use crate::error::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    System,
    User,
    Assistant,
}

/// One turn of a chat, in the form in which templates read it.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Turn<'a> {
    pub(crate) role: Role,
    pub(crate) content: &'a str,
}

/// The most Jinja instructions that a template may take; Qwen's take some hundreds for a chat of a few turns.
const FUEL: u64 = 50_000;

/// The longest template and the size of the stack that it is rendered on, both in bytes. The engine recurses for every
/// operator of a chain (`not not not …`), and a chain of that length needs between 8 and 32 MiB. Unused stack costs
/// nothing.
const LONGEST: usize = 64 << 10;
const STACK: usize = 128 << 20;

#[derive(Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
    source: String,
    /// Whether the model is asked to think before it answers, if the template has a switch for it.
    pub(crate) thinking: bool,
}

impl Template {
    pub(crate) fn new(source: &str) -> Self {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        // A template is a stranger's program: its steps are limited, and filters that lengthen text by a given number
        // are removed.
        environment.set_fuel(Some(FUEL));
        for filter in ["batch", "format", "indent", "slice"] {
            environment.remove_filter(filter);
        }
        environment.set_unknown_method_callback(|state, value, method, args| match method {
            "format" => Err(ErrorKind::UnknownMethod.into()),
            _ => unknown_method_callback(state, value, method, args),
        });
        environment.add_function("raise_exception", raise);
        // A date in the prompt would give a different prompt every day.
        environment.add_function("strftime_now", |_: String| {
            raise("it writes today's date into the prompt, so no run could be repeated".to_owned())
        });
        environment.add_filter("tojson", python_json);
        Self { environment, source: generation_as_if(source), thinking: false }
    }

    /// The text of a chat; with `generation`, it ends where the assistant's answer would start.
    pub(crate) fn render(&self, turns: &[Turn<'_>], generation: bool) -> Result<String> {
        let refused = |problem: String| Error::ChatTemplate { problem };
        if self.source.len() > LONGEST {
            return Err(refused(format!("it has {} bytes, expected {LONGEST} at most", self.source.len())));
        }
        let render = || {
            let values =
                context! { messages => turns, add_generation_prompt => generation, enable_thinking => self.thinking };
            self.environment.render_named_str("chat_template", &self.source, values).map_err(|error| error.to_string())
        };
        let rendered = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, render);
            let ended = thread.map_err(|error| error.to_string())?.join();
            ended.unwrap_or_else(|_| Err("the template engine gave up".to_owned()))
        });
        rendered.map_err(refused)
    }
}

/// Replaces `{% generation %}` blocks, which mark answers for training and render as their content, by `{% if true %}`
/// blocks.
fn generation_as_if(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        let word = tag.trim_start_matches(['-', '+']).trim_start();
        let lead = &tag[..tag.len() - word.len()];
        let ends = |after: &str| after.trim_start().trim_start_matches(['-', '+']).starts_with("%}");
        let replaced = [("generation", "if true"), ("endgeneration", "endif")]
            .into_iter()
            .find_map(|(name, with)| Some((with, word.strip_prefix(name).filter(|after| ends(after))?)));
        rest = match replaced {
            Some((with, after)) => {
                out.push_str(lead);
                out.push_str(with);
                after
            }
            None => tag,
        };
    }
    out.push_str(rest);
    out
}

fn raise(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` spaces it.
fn python_json(value: &Value) -> std::result::Result<Value, minijinja::Error> {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonSpacing);
    let written = value.serialize(&mut serializer).map_err(|error| error.to_string());
    let text = written.and_then(|()| String::from_utf8(out).map_err(|error| error.to_string()));
    text.map(Value::from_safe_string).map_err(|problem| minijinja::Error::new(ErrorKind::BadSerialization, problem))
}

struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String> {
        let turns = [Turn { role: Role::User, content: "hi" }, Turn { role: Role::Assistant, content: "<a>b</a>c" }];
        Template::new(source).render(&turns, true)
    }

    #[test]
    fn the_constructs_of_qwen_templates_work() {
        let cases = [
            ("{%- for m in messages[::-1] %}{{ m.role }},{% endfor %}", "assistant,user,"),
            (
                "{%- set ns = namespace(n=messages|length - 1) %}\n{%- for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "3",
            ),
            ("{{ messages[1].content.split('</a>')[0].split('<a>')[-1] }}", "b"),
            (
                "{{ messages[-1]['content'].split('</a>')[-1].lstrip('c') }}|{{ 'xxaxx'.strip('x') }}|{{ 'ab\n\n'.rstrip('\n') }}",
                "|a|ab",
            ),
            ("{% if messages[0].content is string and not messages[0].content.startswith('x') %}yes{% endif %}", "yes"),
            ("{% if enable_thinking is defined and enable_thinking is false %}off{% endif %}", "off"),
            ("{% if tools %}tools{% else %}none{% endif %}{{ messages[0].tool_calls }}", "none"),
            ("  {% if true %}\nkept\n  {% endif %}\nend\n", "kept\nend"),
            ("{{ {'a': [1, \"<é>'\"], 'b': true} | tojson }}", "{\"a\": [1, \"<é>'\"], \"b\": true}"),
            ("a{%- generation -%} b {%- endgeneration %}\nc {% set generation = 1 %}{{ generation }}", "abc 1"),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn what_the_template_refuses_is_told() {
        let message = |source: &str| render(source).unwrap_err().to_string();
        assert!(message("{{ raise_exception('only two turns') }}").contains("only two turns"));
        assert!(message("{{ strftime_now('%d') }}").contains("today's date"));
        assert!(message("{% for %}").contains("chat template: "));
    }

    #[test]
    fn a_template_has_so_many_steps_and_makes_no_text_as_long_as_a_number_says() {
        let message = |source: &str| render(source).unwrap_err().to_string();
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}";
        assert!(message(endless).contains("engine ran out of fuel"), "{}", message(endless));
        assert!(message("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").contains("recursion limit"));
        for (source, expected) in [
            ("{{ 'ab' * 999999999999 }}", "repeated string is too large"),
            ("{{ '{:999999999999}'.format('a') }}", "unknown method"),
            ("{{ '%999999999999d'|format(1) }}", "unknown filter"),
            ("{{ messages|batch(999999999999) }}", "unknown filter"),
            ("{{ messages|slice(999999999999) }}", "unknown filter"),
            ("{{ 'a'|indent(18446744073709551615, true) }}", "unknown filter"),
        ] {
            assert!(message(source).contains(expected), "{source}: {}", message(source));
        }
        for (start, link, end) in [
            ("{{ ", "not ", "1 }}"),
            ("{{ ", "-", "1 }}"),
            ("{{ ", "1+", "1 }}"),
            ("{{ ", "1~", "1 }}"),
            ("{{ ", "1**", "1 }}"),
            ("{{ ", "1 and ", "1 }}"),
            ("{{ a", ".b", " }}"),
            ("{{ a", "()", " }}"),
            ("{{ a", "[1]", " }}"),
            ("{{ a", "|e", " }}"),
            ("{{ a", " is e", " }}"),
            ("{% if 1 %}", "{% elif 1 %}", "{% endif %}"),
        ] {
            let chain =
                |room: usize| format!("{start}{}{end}", link.repeat((room - start.len() - end.len()) / link.len()));
            let _ = render(&chain(LONGEST)); // either result is fine: the process must not end
            assert!(message(&chain(2 * LONGEST)).contains("expected 65536 at most"), "{link}");
        }
        let deep = |n: usize| format!("{{{{ {}1{} }}}}", "(".repeat(n), ")".repeat(n));
        assert_eq!(render(&deep(10)).unwrap(), "1");
        assert!(message(&deep(30_000)).contains("recursion limit"), "{}", message(&deep(30_000)));
    }
}
