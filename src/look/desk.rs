//! One thread has the models and answers one request after another. A request waits in a queue; one that the same page
//! has overtaken by a newer one of its kind is dropped.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;

use super::models::{Draw, Models, Quantity};
use super::setting::Setting;
use crate::output::hint::explained;
use crate::stages::run_dir::RunDir;

/// A question of a page.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    /// What the run has.
    Run,
    /// The chat under a setting, in two parts: its tokens, and what the models say.
    Look {
        /// The setting.
        setting: Setting,
    },
    /// A number for each token.
    Quantity {
        /// The setting.
        setting: Setting,
        /// Which number.
        quantity: Quantity,
    },
    /// What the residual stream says after each block.
    ByBlock {
        /// The setting.
        setting: Setting,
    },
    /// The direction added to the base, block by block.
    Push {
        /// The setting, of which the chat counts.
        setting: Setting,
    },
    /// Sampled answers, one after another.
    Draw {
        /// The setting.
        setting: Setting,
        /// How they are sampled.
        draw: Draw,
    },
}

/// A part of an answer, or the sentence that says what is wrong. The answer ends when the channel closes.
pub type Part = Result<Value, Refusal>;

/// A question that is not answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The error in a sentence.
    pub error: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// Whether the page itself asked something newer.
    pub overtaken: bool,
}

impl Refusal {
    /// A refusal with a sentence.
    pub fn of(error: impl Into<String>) -> Self {
        Self { error: error.into(), hint: None, overtaken: false }
    }
}

struct Waiting {
    page: String,
    question: Question,
    answer: mpsc::UnboundedSender<Part>,
}

/// The most questions that wait at a time.
const MOST_WAITING: usize = 64;

/// The queue of the thread that has the models.
#[derive(Clone, Default)]
pub struct Desk {
    shared: Arc<(Mutex<VecDeque<Waiting>>, Condvar)>,
}

impl Desk {
    /// Starts the thread. `ready` is called when the models are loaded, or with the error.
    pub fn open(run: RunDir, ready: impl FnOnce(anyhow::Result<()>) + Send + 'static) -> Self {
        let desk = Self::default();
        let queue = desk.clone();
        thread::spawn(move || match Models::open(run) {
            Ok(mut models) => {
                ready(Ok(()));
                loop {
                    let waiting = queue.next();
                    let answered = AssertUnwindSafe(|| answer(&mut models, &waiting));
                    if catch_unwind(answered).is_err() {
                        let refusal = Refusal::of("the program failed at this question; its terminal says where");
                        let _ = waiting.answer.send(Err(refusal)); // a page that is gone does not mind
                    }
                }
            }
            Err(error) => ready(Err(error)),
        });
        desk
    }

    /// Puts a page's question into the queue and returns the parts of its answer.
    pub fn ask(&self, page: &str, question: Question) -> mpsc::UnboundedReceiver<Part> {
        let (answer, parts) = mpsc::unbounded_channel();
        let mut queue = self.queue();
        let of = std::mem::discriminant(&question);
        queue.retain(|waiting| {
            let overtaken = waiting.page == page && std::mem::discriminant(&waiting.question) == of;
            if overtaken {
                let refusal = Refusal { overtaken, ..Refusal::of("a newer question of the same page took its place") };
                let _ = waiting.answer.send(Err(refusal)); // a page that is gone does not mind
            }
            !overtaken
        });
        if queue.len() >= MOST_WAITING {
            let _ = answer.send(Err(Refusal::of(format!("{MOST_WAITING} questions are waiting, expected fewer"))));
        } else {
            queue.push_back(Waiting { page: page.to_owned(), question, answer });
            self.shared.1.notify_one();
        }
        parts
    }

    fn next(&self) -> Waiting {
        let mut queue = self.queue();
        loop {
            match queue.pop_front() {
                // A page that closed its connection needs no answer.
                Some(waiting) if waiting.answer.is_closed() => {}
                Some(waiting) => return waiting,
                None => queue = self.shared.1.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn answer(models: &mut Models, waiting: &Waiting) {
    let Waiting { question, answer, .. } = waiting;
    let send = |part: Part| answer.send(part).is_ok();
    let whole = |value: serde_json::Result<Value>| value.map_err(anyhow::Error::from);
    let found = match question {
        Question::Run => models.described().and_then(|run| whole(serde_json::to_value(run))).map(Some),
        Question::Look { setting } => {
            // The tokens first: on a large model the numbers take longer.
            let rendered = models.rendered(setting).and_then(|chat| whole(serde_json::to_value(chat)));
            rendered.and_then(|rendered| {
                send(Ok(rendered));
                models.compared(setting).and_then(|said| whole(serde_json::to_value(said))).map(Some)
            })
        }
        Question::Quantity { setting, quantity } => models
            .quantity(setting, *quantity, &|| !answer.is_closed())
            .and_then(|values| whole(serde_json::to_value(values)))
            .map(Some),
        Question::ByBlock { setting } => {
            models.by_block(setting).and_then(|found| whole(serde_json::to_value(found))).map(Some)
        }
        Question::Push { setting } => {
            let mut each = |pushed| serde_json::to_value(pushed).is_ok_and(|pushed| send(Ok(pushed)));
            models.push(setting, &mut each).map(|()| None)
        }
        Question::Draw { setting, draw } => {
            let mut each = |drawn| serde_json::to_value(drawn).is_ok_and(|drawn| send(Ok(drawn)));
            models.draw(setting, draw, &mut each).map(|()| None)
        }
    };
    match found {
        Ok(Some(value)) => {
            send(Ok(value));
        }
        Ok(None) => {}
        Err(error) => {
            let (error, hint) = explained(&error);
            send(Err(Refusal { error, hint, overtaken: false }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(user: &str) -> Question {
        let setting = Setting {
            student: "student".to_owned(),
            system: None,
            user: user.to_owned(),
            gate: hooks::Gate::EVERYWHERE,
            steer: None,
        };
        Question::Look { setting }
    }

    #[test]
    fn a_newer_question_of_the_same_page_and_kind_takes_the_older_one_s_place() {
        let desk = Desk::default();
        let mut first = desk.ask("a", look("1"));
        let mut other_page = desk.ask("b", look("2"));
        let mut other_kind = desk.ask("a", Question::Run);
        let mut newer = desk.ask("a", look("3"));
        assert!(first.try_recv().unwrap().unwrap_err().overtaken);
        for waiting in [&mut other_page, &mut other_kind, &mut newer] {
            assert!(waiting.try_recv().is_err(), "it still waits");
        }
        drop(other_page);
        assert!(matches!(desk.next().question, Question::Run), "a page that is gone is passed over");
        assert!(matches!(desk.next().question, Question::Look { setting } if setting.user == "3"));
    }

    #[test]
    fn a_full_queue_refuses() {
        let desk = Desk::default();
        let all: Vec<_> = (0..=MOST_WAITING).map(|page| desk.ask(&page.to_string(), Question::Run)).collect();
        let refused = all.into_iter().filter_map(|mut parts| parts.try_recv().ok()).collect::<Vec<_>>();
        assert_eq!(refused.len(), 1);
        assert!(refused[0].as_ref().unwrap_err().error.contains("64 questions"));
    }

    #[test]
    fn a_question_with_an_unknown_key_is_refused() {
        let parse = |text: &str| serde_json::from_str::<Question>(text);
        assert!(matches!(parse(r#"{"ask":"run"}"#), Ok(Question::Run)));
        for wrong in [r#"{"ask":"walk"}"#, r#"{"ask":"look"}"#, r#"{"ask":"look","setting":{"user":"a"}}"#] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
