//! The server: the page's files, and its questions as JSON. A request is admitted by `guard.rs`, bounded in size and
//! time, and answered by `desk.rs`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use serde::Deserialize;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use super::desk::{Desk, Part, Question, Refusal};
use super::guard::Guard;
use crate::output::progress::{print, say};
use crate::stages::run_dir::RunDir;

/// Where the server listens.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    /// The network address; this machine's own by default.
    pub host: IpAddr,
    /// The port; 0 is any that is free.
    pub port: u16,
}

/// The page's files: name, type and content.
const FILES: [(&str, &str, &str); 5] = [
    ("", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("look.css", "text/css; charset=utf-8", include_str!("page/look.css")),
    ("gate.js", "text/javascript; charset=utf-8", include_str!("page/gate.js")),
    ("draw.js", "text/javascript; charset=utf-8", include_str!("page/draw.js")),
    ("look.js", "text/javascript; charset=utf-8", include_str!("page/look.js")),
];

/// The most bytes of a question.
const MOST_BYTES: usize = 64 * 1024;

/// The longest time in which a question arrives.
const SENDING: Duration = Duration::from_secs(10);

/// The longest wait for a part of an answer.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a page may do: load its own files, and ask this server.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

struct Shared {
    guard: Guard,
    desk: Desk,
}

/// A question, and the page that asks it.
#[derive(Deserialize)]
struct Asked {
    page: String,
    #[serde(flatten)]
    question: Question,
}

/// Serves the page of a run until the program is ended. Prints the page's address when it can be opened.
pub fn serve(run: RunDir, address: Address) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let at = SocketAddr::new(address.host, address.port);
        let listener =
            tokio::net::TcpListener::bind(at).await.with_context(|| format!("{at} cannot be listened at"))?;
        let guard = Guard::new(listener.local_addr()?)?;
        let (loaded, is_loaded) = tokio::sync::oneshot::channel();
        say(format!("look: loading the models of {}", run.root().display()));
        let desk = Desk::open(run, |result| drop(loaded.send(result)));
        is_loaded.await.context("the thread with the models ended")??;
        print(&format!("{}\n", guard.page()))?;
        say("look: open this address in a browser of this machine; end with Ctrl-C");
        let shared = Arc::new(Shared { guard, desk });
        Ok(axum::serve(listener, Router::new().fallback(answered).with_state(shared)).await?)
    })
}

async fn answered(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let text = |headers: &HeaderMap, name| headers.get(name).and_then(|value| value.to_str().ok().map(str::to_owned));
    let (head, body) = request.into_parts();
    let host = text(&head.headers, header::HOST).or_else(|| head.uri.authority().map(ToString::to_string));
    let origin = text(&head.headers, header::ORIGIN);
    let path = match shared.guard.admitted(host.as_deref(), origin.as_deref(), head.uri.path()) {
        Ok(path) => path,
        Err(reason) => return refused(StatusCode::FORBIDDEN, reason),
    };
    match (&head.method, path) {
        (&Method::POST, "ask") => asked(&shared.desk, &head.headers, body).await,
        (&Method::GET, path) => match FILES.iter().find(|(name, ..)| *name == path) {
            Some((_, kind, content)) => response(StatusCode::OK, kind, Body::from(*content)),
            None => refused(StatusCode::NOT_FOUND, format!("there is no file {path:?}")),
        },
        (method, path) => refused(StatusCode::METHOD_NOT_ALLOWED, format!("{method} {path:?} is not answered")),
    }
}

/// The parts of an answer, a line of JSON each.
async fn asked(desk: &Desk, headers: &HeaderMap, body: Body) -> Response {
    // Other pages cannot send this type without asking first.
    if headers.get(header::CONTENT_TYPE).is_none_or(|kind| kind != "application/json") {
        return refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, "a question is application/json");
    }
    let bytes = match timeout(SENDING, to_bytes(body, MOST_BYTES)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(_)) => {
            return refused(StatusCode::PAYLOAD_TOO_LARGE, format!("a question has {MOST_BYTES} bytes at most"));
        }
        Err(_) => return refused(StatusCode::REQUEST_TIMEOUT, "the question took too long to arrive"),
    };
    let Asked { page, question } = match serde_json::from_slice(&bytes) {
        Ok(asked) => asked,
        Err(error) => return refused(StatusCode::BAD_REQUEST, format!("the question cannot be read: {error}")),
    };
    let mut parts = desk.ask(&page, question);
    let first = match next(&mut parts).await {
        Some(Ok(first)) => first,
        Some(Err(refusal)) => return refusal_response(StatusCode::UNPROCESSABLE_ENTITY, &refusal),
        None => return refused(StatusCode::INTERNAL_SERVER_ERROR, "the thread with the models ended"),
    };
    let (lines, body) = tokio::sync::mpsc::channel::<Result<String, std::convert::Infallible>>(8);
    tokio::spawn(async move {
        let mut part = Some(Ok(first));
        while let Some(found) = part {
            let line = match found {
                Ok(value) => value.to_string(),
                Err(refusal) => serde_json::to_string(&refusal).unwrap_or_default(),
            };
            if lines.send(Ok(line + "\n")).await.is_err() {
                return; // the page is gone: dropping `parts` tells the models' thread
            }
            part = next(&mut parts).await;
        }
    });
    response(StatusCode::OK, "application/x-ndjson", Body::from_stream(ReceiverStream::new(body)))
}

/// The next part of an answer. A wait that is too long is a refusal.
async fn next(parts: &mut UnboundedReceiver<Part>) -> Option<Part> {
    let waited = timeout(PATIENCE, parts.recv()).await;
    waited.unwrap_or_else(|_| {
        parts.close();
        Some(Err(Refusal::of(format!("no answer within {} seconds", PATIENCE.as_secs()))))
    })
}

fn refused(status: StatusCode, error: impl Into<String>) -> Response {
    refusal_response(status, &Refusal::of(error))
}

fn refusal_response(status: StatusCode, refusal: &Refusal) -> Response {
    let text = serde_json::to_string(refusal).unwrap_or_default();
    response(status, "application/json", Body::from(text))
}

fn response(status: StatusCode, kind: &'static str, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let fixed = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    response.headers_mut().extend(fixed.map(|(name, value)| (name, HeaderValue::from_static(value))));
    response
}
