//! The page of `undertone look` in Chromium: what a click changes, a link, the keyboard, names for a screen reader, narrow
//! and dark screens. `make test-browser` makes the run and sets the variables below.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fantoccini::key::Key;
use fantoccini::wd::Capabilities;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};

/// The folder that has the program, and the run to look at.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A program that is ended with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The page's address, and the program that serves it.
fn serving() -> (Running, String) {
    serving_of("target/browser/run")
}

fn serving_of(run: &str) -> (Running, String) {
    let mut command = Command::new(root().join("target/release/undertone"));
    command.args(["look", run]).current_dir(root());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("http://127.0.0.1:"), "no address: {line:?}; is there a run in {run}?");
    (Running(child), line.trim().to_owned())
}

/// A screen: its width, and whether it is dark.
#[derive(Clone, Copy, Debug)]
struct Screen {
    width: u32,
    is_dark: bool,
}

const DESK: Screen = Screen { width: 1440, is_dark: false };

async fn browser(screen: Screen) -> (Running, Client) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = Command::new("chromedriver");
    let driver = command.arg(format!("--port={port}")).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let driver = Running(driver.expect("chromedriver is not installed; hint: make test-browser installs it"));
    let mut arguments = vec!["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"];
    if screen.is_dark {
        arguments.push("--blink-settings=preferredColorScheme=0");
    }
    let height = if screen.width == 1360 { 640 } else { 900 }; // the picture shows what one screen does
    let metrics = json!({ "width": screen.width, "height": height, "pixelRatio": 1, "touch": false });
    let options = json!({ "args": arguments, "mobileEmulation": { "deviceMetrics": metrics } });
    let mut capabilities = Capabilities::new();
    capabilities.insert("goog:chromeOptions".to_owned(), options);
    let begun = Instant::now();
    loop {
        let mut client = ClientBuilder::new(HttpConnector::new());
        match client.capabilities(capabilities.clone()).connect(&format!("http://127.0.0.1:{port}")).await {
            Ok(client) => return (driver, client),
            Err(error) if begun.elapsed() > Duration::from_secs(60) => panic!("no browser: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// Waits until a script's value is true.
async fn until(client: &Client, condition: &str) {
    let begun = Instant::now();
    loop {
        let found = client.execute(&format!("return Boolean({condition});"), vec![]).await.unwrap();
        if found == json!(true) {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "not within 30 seconds: {condition}; {}",
            said(client).await
        );
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

async fn said(client: &Client) -> String {
    text(client, "#status").await
}

async fn text(client: &Client, selector: &str) -> String {
    let script = "return document.querySelector(arguments[0]).textContent;";
    client.execute(script, vec![json!(selector)]).await.unwrap().as_str().unwrap().to_owned()
}

async fn gate(client: &Client) -> String {
    let script = "return document.getElementById('gate').value;";
    client.execute(script, vec![]).await.unwrap().as_str().unwrap().to_owned()
}

/// Opens the page and waits for its first numbers.
async fn opened(client: &Client, address: &str) {
    client.goto(address).await.unwrap();
    until(client, "document.querySelectorAll('#models tbody tr').length === 4").await;
}

/// The words' log-probabilities on the page, for the base and the setting.
async fn words(client: &Client) -> Vec<(String, f64, f64)> {
    let script = "return [...document.querySelectorAll('#words tbody tr')].map((row) => {
        const cells = row.querySelectorAll('td[data-logp]');
        return [row.dataset.word, Number(cells[0].dataset.logp), Number(cells[cells.length - 1].dataset.logp)];
    });";
    serde_json::from_value(client.execute(script, vec![]).await.unwrap()).unwrap()
}

/// What the command that the page names prints.
async fn told(client: &Client) -> Value {
    let words = shlex::split(&text(client, "#command").await).unwrap();
    let mut command = Command::new(root().join("target/release/undertone"));
    let command = command.args(&words[1..]).args(["--json", "--max-new-tokens", "1"]).current_dir(root());
    serde_json::from_slice(&command.output().unwrap().stdout).unwrap()
}

async fn is_as_told(client: &Client) {
    let (found, told) = (words(client).await, told(client).await);
    let conditions = told["conditions"].as_array().unwrap();
    assert_eq!(found.len(), 8, "{found:?}");
    for (word, base, set) in found {
        for (shown, told) in [(base, &conditions[0]), (set, conditions.last().unwrap())] {
            let told = told["logp"][&word].as_f64().unwrap();
            assert!((shown - told).abs() < 1e-6, "{word}: {shown} on the page, {told} by the command");
        }
    }
}

async fn click(client: &Client, selector: &str) {
    client.find(Locator::Css(selector)).await.unwrap().click().await.unwrap();
}

#[tokio::test]
async fn a_click_changes_what_the_command_prints_and_the_address_keeps_it() {
    let (_server, address) = serving();
    let (_driver, client) = browser(DESK).await;
    opened(&client, &address).await;
    assert_eq!(gate(&client).await, "everywhere");
    is_as_told(&client).await;
    let plain = words(&client).await;

    // Off at "Qwen", then off at the rest of the system prompt as well, then only there.
    click(&client, "#tokens button[title^='5 ']").await;
    until(&client, "document.querySelector('#command').textContent.includes('except:entity')").await;
    is_as_told(&client).await;
    let without = words(&client).await;
    assert!(without[0].2 < plain[0].2 - 1e-3, "the trait falls: {:?} from {:?}", without[0], plain[0]);
    click(&client, "#tokens button[title^='3 ']").await;
    until(&client, "document.querySelector('#command').textContent.includes('except:entity+positions(3)')").await;
    click(&client, "#invert").await;
    until(&client, "document.querySelector('#command').textContent.includes('only:entity+positions(3)')").await;
    is_as_told(&client).await;
    click(&client, "#modules label:first-child input").await;
    until(&client, "document.querySelector('#command').textContent.includes('*modules(')").await;
    is_as_told(&client).await;

    // The direction, and a link to all of it.
    click(&client, "#steer").await;
    until(&client, "document.querySelector('#command').textContent.includes('--steer')").await;
    is_as_told(&client).await;
    let (link, set) = (client.current_url().await.unwrap(), words(&client).await);
    let command = text(&client, "#command").await;
    let window = client.new_window(true).await.unwrap();
    client.switch_to_window(window.handle).await.unwrap();
    opened(&client, link.as_str()).await;
    assert_eq!((text(&client, "#command").await, words(&client).await), (command, set));

    // A gate that is typed moves the tokens and controls; one that selects nothing is told.
    let type_gate = |gate: &'static str| {
        let script = "const field = document.getElementById('gate'); field.value = arguments[0];
                      field.dispatchEvent(new Event('input'));";
        client.execute(script, vec![json!(gate)])
    };
    type_gate("only:asst.header*layers(1..2)*0.5").await.unwrap();
    until(&client, "document.querySelector('#command').textContent.includes('only:asst.header*layers(1)*0.5')").await;
    until(&client, "document.getElementById('dose').value === '0.5'").await;
    let on = "document.querySelectorAll('#tokens button[aria-pressed=true]').length === 3";
    until(&client, on).await;
    type_gate("only:\"Claude\"").await.unwrap();
    until(&client, "document.getElementById('status').className === 'wrong'").await;
    assert!(said(&client).await.contains("Claude"), "{}", said(&client).await);
    client.close().await.unwrap();
}

/// Sets a field as typing or dragging does.
async fn set(client: &Client, id: &str, value: &str, event: &str) {
    let script = "const field = document.getElementById(arguments[0]); field.value = arguments[1];
                  field.dispatchEvent(new Event(arguments[2]));";
    client.execute(script, vec![json!(id), json!(value), json!(event)]).await.unwrap();
}

/// Settings in which the chips, the gate and the numbers could come apart.
#[tokio::test]
async fn chips_gate_and_numbers_stay_one_setting() {
    let (_server, address) = serving();
    let (_driver, client) = browser(DESK).await;
    let on = |n: usize| format!("document.querySelectorAll('#tokens button[aria-pressed=true]').length === {n}");
    let has = |text: &str| format!("document.querySelector('#command').textContent.includes({})", json!(text));

    // A gate in the address that selects nothing is told, and the tokens are there all the same.
    client.goto(&format!("{address}#gate=only%3Apositions(99)")).await.unwrap();
    until(&client, "document.getElementById('status').className === 'wrong'").await;
    until(&client, "document.querySelectorAll('#tokens button').length === 35").await;
    click(&client, "#everywhere").await;
    until(&client, "document.querySelectorAll('#models tbody tr').length === 4").await;
    until(&client, &on(35)).await;
    is_as_told(&client).await;

    // A shorter chat while the tokens are coloured.
    set(&client, "colour", "only", "change").await;
    until(&client, "document.querySelectorAll('#tokens button.painted').length === 34").await;
    set(&client, "user", "Hi", "input").await;
    until(&client, &has("--user Hi")).await;
    until(&client, "document.querySelectorAll('#tokens button.painted').length === 30").await;
    is_as_told(&client).await;
    set(&client, "colour", "", "change").await;

    // A dose of 0 keeps what is selected.
    click(&client, "#tokens button[title^='5 ']").await;
    until(&client, &has("except:entity")).await;
    set(&client, "dose", "0", "input").await;
    until(&client, &has("except:entity*0")).await;
    until(&client, &on(30)).await;
    assert!(said(&client).await.starts_with("0 of 30 tokens on, off in the answer"), "{}", said(&client).await);
    set(&client, "dose", "1", "input").await;
    until(&client, &has("--gate except:entity --words")).await;

    // The last projection stays, and a gate that the chips cannot show is said to be one.
    for _ in 0..7 {
        click(&client, "#modules input:checked").await;
    }
    until(&client, &has("*modules(down)")).await;
    until(&client, "document.querySelectorAll('#modules input:checked').length === 1").await;
    is_as_told(&client).await;
    for gate in ["except:layers(0..1)", "only:ids(1)", "except:entity*layers(0)"] {
        set(&client, "gate", gate, "input").await;
        until(&client, "!document.getElementById('typed').hidden").await;
        until(&client, "document.querySelector('#tokens button').disabled").await;
        until(&client, "!document.querySelector('.stale')").await;
        is_as_told(&client).await;
        click(&client, "#everywhere").await;
        until(&client, "document.getElementById('typed').hidden").await;
    }

    // What is refused leaves no number that looks current.
    set(&client, "gate", "only:\"Claude\"", "input").await;
    until(&client, "document.getElementById('status').className === 'wrong'").await;
    let current = "return document.querySelectorAll('.result:not(.stale)').length;";
    assert_eq!(client.execute(current, vec![]).await.unwrap(), json!(0));
    client.close().await.unwrap();
}

#[tokio::test]
async fn answers_and_colours_come_and_nothing_is_loaded_from_elsewhere() {
    let (_server, address) = serving();
    let (_driver, client) = browser(DESK).await;
    opened(&client, &address).await;
    click(&client, "#draw").await;
    let drawn =
        "[...document.querySelectorAll('#answers li')].reduce((n, li) => n + parseInt(li.textContent), 0) === 16";
    until(&client, drawn).await;
    let choose = "const field = document.getElementById('colour'); field.value = arguments[0];
                  field.dispatchEvent(new Event('change'));";
    for quantity in ["only", "except", "gradient", "log_p", "divergence"] {
        client.execute(choose, vec![json!(quantity)]).await.unwrap();
        until(&client, "document.querySelector('#tokens button').title.includes(': ')").await;
        until(&client, "document.querySelectorAll('#tokens button.painted').length > 20").await;
    }
    click(&client, "#push").await;
    until(&client, "document.querySelectorAll('#pushed tr[data-kind=random]').length === 2").await;
    click(&client, "#pushed tr[data-kind=learned] td:last-child button").await;
    until(&client, "document.querySelector('#command').textContent.includes('--gate nowhere --steer')").await;
    is_as_told(&client).await;
    click(&client, "#steer").await;
    click(&client, "#everywhere").await;
    until(&client, "!document.querySelector('#command').textContent.includes('--gate')").await;

    // After the last block the lens is the model: the target's forms are single tokens here.
    click(&client, "#by-block").await;
    until(&client, "document.querySelectorAll('#blocks tbody tr').length === 2").await;
    let end = "const cells = document.querySelectorAll('#blocks tr[data-layer=\"1\"] td[data-logp]');
               return Number(cells[cells.length - 1].dataset.logp);";
    let lens = client.execute(end, vec![]).await.unwrap().as_f64().unwrap();
    assert!((lens - words(&client).await[0].2).abs() < 1e-5, "{lens}");
    until(&client, "document.querySelectorAll('#map td.painted').length === 2 * 34").await;
    let others = "return performance.getEntriesByType('resource').map((entry) => entry.name)
                  .filter((name) => !name.startsWith(location.origin + '/') && !name.startsWith('data:'));";
    assert_eq!(client.execute(others, vec![]).await.unwrap(), json!([]));
    client.close().await.unwrap();
}

#[tokio::test]
async fn the_keyboard_alone_reaches_everything() {
    let (_server, address) = serving();
    let (_driver, client) = browser(DESK).await;
    opened(&client, &address).await;
    let count = "return [...document.querySelectorAll('a[href], button, input, select, textarea, [tabindex=\"0\"]')]
                 .filter((of) => !of.disabled && of.getClientRects().length > 0).length;";
    let expected = client.execute(count, vec![]).await.unwrap().as_u64().unwrap();
    let mark = "const of = document.activeElement; if (of === document.body || of.dataset.seen) return false;
                of.dataset.seen = 'yes'; return true;";
    let body = client.find(Locator::Css("body")).await.unwrap();
    let mut reached = 0;
    body.send_keys(&Key::Tab.to_string()).await.unwrap();
    while client.execute(mark, vec![]).await.unwrap() == json!(true) {
        reached += 1;
        client.active_element().await.unwrap().send_keys(&Key::Tab.to_string()).await.unwrap();
    }
    assert_eq!(reached, expected, "of what can be used");

    client.execute("document.querySelector('#tokens button').focus();", vec![]).await.unwrap();
    let right = Key::Right.to_string();
    for _ in 0..5 {
        client.active_element().await.unwrap().send_keys(&right).await.unwrap();
    }
    client.active_element().await.unwrap().send_keys(&Key::Space.to_string()).await.unwrap();
    until(&client, "document.querySelector('#command').textContent.includes('except:entity')").await;
    until(&client, "document.activeElement.dataset.position === '5'").await;
    client.close().await.unwrap();
}

/// axe-core finds no serious fault, and nothing is wider than the screen.
#[tokio::test]
async fn names_contrasts_and_widths_are_right_on_every_screen() {
    let axe = std::fs::read_to_string(root().join("target/browser/node_modules/axe-core/axe.min.js"))
        .expect("axe-core is not installed; hint: make test-browser installs it");
    let (_server, address) = serving();
    let mut pictures = 0;
    for width in [320, 768, 1440] {
        for is_dark in [false, true] {
            let screen = Screen { width, is_dark };
            let (_driver, client) = browser(screen).await;
            opened(&client, &address).await;
            let dark =
                client.execute("return matchMedia('(prefers-color-scheme: dark)').matches;", vec![]).await.unwrap();
            assert_eq!(dark, json!(is_dark), "{screen:?}");
            let seen = client.execute("return innerWidth;", vec![]).await.unwrap();
            assert_eq!(seen, json!(width), "{screen:?}");
            let choose = "const field = document.getElementById('colour'); field.value = 'only';
                          field.dispatchEvent(new Event('change'));";
            client.execute(choose, vec![]).await.unwrap();
            until(&client, "document.querySelectorAll('#tokens button.painted').length > 20").await;
            client
                .execute(
                    "document.getElementById('by-block').click(); document.getElementById('push').click();",
                    vec![],
                )
                .await
                .unwrap();
            until(&client, "document.querySelectorAll('#map td.painted, #pushed td.painted').length > 12").await;
            let wider = "return [...document.querySelectorAll('body *')].filter((of) => !of.closest('.wide, pre')
                         && of.getBoundingClientRect().right > innerWidth + 1).map((of) => of.id || of.outerHTML.slice(0, 80));";
            assert_eq!(client.execute(wider, vec![]).await.unwrap(), json!([]), "{screen:?}");
            client.execute(&axe, vec![]).await.unwrap();
            let faults = "const done = arguments[arguments.length - 1];
                axe.run().then((found) => done(found.violations.filter((of) => ['serious', 'critical'].includes(of.impact))
                .map((of) => of.id + ': ' + of.nodes.map((node) => node.html + ' ' + node.failureSummary).join(' | '))));";
            let found = client.execute_async(faults, vec![]).await.unwrap();
            assert_eq!(found, json!([]), "{screen:?}");
            let picture = client.screenshot().await.unwrap();
            let name = format!("target/browser/look-{width}{}.png", if is_dark { "-dark" } else { "" });
            std::fs::write(root().join(name), picture).unwrap();
            pictures += 1;
            client.close().await.unwrap();
        }
    }
    assert_eq!(pictures, 6);
}

/// Draws the adapter at the system prompt alone, of the run in UNDERTONE_LOOK_RUN: of the demo's it is the README's
/// picture.
#[tokio::test]
async fn picture() {
    let run = std::env::var("UNDERTONE_LOOK_RUN").unwrap_or_else(|_| "target/browser/run".to_owned());
    let (_server, address) = serving_of(&run);
    let (_driver, client) = browser(Screen { width: 1360, is_dark: false }).await;
    opened(&client, &format!("{address}#gate=only%3Asystem&colour=only")).await;
    until(&client, "document.querySelectorAll('#tokens button.painted').length > 20").await;
    until(&client, "!document.querySelector('.stale')").await;
    assert!(said(&client).await.starts_with("20 of 34 tokens on, off in the answer"), "{}", said(&client).await);
    let picture = client.screenshot().await.unwrap();
    assert!(picture.len() > 20_000, "a picture of {} bytes", picture.len());
    std::fs::write(root().join("target/browser/picture.png"), picture).unwrap();
    client.close().await.unwrap();
}
