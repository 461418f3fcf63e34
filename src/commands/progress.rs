//! A move as it is watched from outside: a bar on a terminal, lines elsewhere, JSON lines for programs.

use super::{Output, print};
use crate::control::client::{Client, Error as ClientError, EventStream, Heard, PATIENCE};
use crate::control::machine::Ended;
use crate::control::movement::{Downtime, Failure, Kind, MoveStatus, Phase};
use crate::control::protocol::Request;
use crate::error::Error;
use crate::events::{Event, Record};
use crate::registry::Registry;
use crate::units::format_size;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Write;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long one step of waiting takes: between two it is looked whether the user has had enough.
const STEP: Duration = Duration::from_millis(200);
/// A move in doubt for so long is left to a person.
const DOUBT_PATIENCE: Duration = Duration::from_secs(15);
/// How long the copy here of a guest that has gone may take to end; its memory may be large.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// How long it is waited for the news that a guest ended whose move broke off: it may have broken off for that.
const END_GRACE: Duration = Duration::from_secs(1);
/// Lines are not written more often, but for a new phase and the first word on the standstill.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Begins a move of `name` with `request` and follows it to its end. Ctrl-C calls it off.
pub fn follow(registry: &Registry, name: &str, request: Request, output: Output) -> Result<(), Error> {
    let stream = Client::connect(registry, name, PATIENCE)?.listen()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|source| Error::Process { attempt: "watch for signals", source })?;
    }
    Client::connect(registry, name, PATIENCE)?.change(request)?;
    watch(registry, name, stream, false, &interrupted, output)
}

/// Follows the move under way of `name` to its end.
pub fn attach(registry: &Registry, name: &str, output: Output) -> Result<(), Error> {
    let stream = Client::connect(registry, name, PATIENCE)?.listen()?;
    match status(registry, name)? {
        Some(status) if status.phase.is_over() => conclude(name, &status, output),
        Some(status) => watch(registry, name, stream, status.incoming, &AtomicBool::new(false), output),
        None => Err(Error::NotMoving { name: name.to_owned() }),
    }
}

/// The move under way of `name`, or its last one.
pub fn status(registry: &Registry, name: &str) -> Result<Option<MoveStatus>, Error> {
    Ok(Client::connect(registry, name, PATIENCE)?.movement()?)
}

fn watch(
    registry: &Registry,
    name: &str,
    mut stream: EventStream,
    is_incoming: bool,
    interrupted: &AtomicBool,
    output: Output,
) -> Result<(), Error> {
    let mut display = Display::new(output);
    let mut doubt: Option<Instant> = None;
    let mut last: Option<MoveStatus> = None;
    let mut cancelled = false;
    loop {
        if interrupted.load(Ordering::Relaxed) && !cancelled {
            cancelled = true;
            display.say("calling the move off");
            // Too late, or over: what comes of it is told by the events.
            if let Err(error) = Client::connect(registry, name, PATIENCE)?.change(Request::MigrationCancel) {
                display.say(&error.to_string());
            }
        }
        if let Some(status) = step(name, &mut stream, is_incoming, last.as_ref())? {
            display.show(&status)?;
            if status.phase.is_over() {
                display.finish();
                settle(name, &status, &mut stream)?;
                return conclude(name, &status, output);
            }
            doubt = (status.phase == Phase::InDoubt).then(|| doubt.unwrap_or_else(Instant::now));
            last = Some(status);
        }
        if let (Some(since), Some(status)) = (doubt, &last)
            && since.elapsed() > DOUBT_PATIENCE
        {
            display.finish();
            return Err(Error::InDoubt { name: name.to_owned(), status: Box::new(status.clone()) });
        }
    }
}

/// Ends a move with `request` and waits until it is over; how it ended.
pub fn end(registry: &Registry, name: &str, request: Request) -> Result<MoveStatus, Error> {
    let mut stream = Client::connect(registry, name, PATIENCE)?.listen()?;
    let is_incoming = status(registry, name)?.is_some_and(|status| status.incoming);
    Client::connect(registry, name, PATIENCE)?.change(request)?;
    let mut last = None;
    let deadline = Instant::now() + END_PATIENCE;
    while Instant::now() < deadline {
        let Some(status) = step(name, &mut stream, is_incoming, last.as_ref())? else { continue };
        if status.phase.is_over() {
            settle(name, &status, &mut stream)?;
            return Ok(status);
        }
        last = Some(status);
    }
    // Its last event may have been lost.
    match status(registry, name)? {
        Some(status) if status.phase.is_over() => Ok(status),
        Some(status) if status.phase == Phase::InDoubt => {
            Err(Error::InDoubt { name: name.to_owned(), status: Box::new(status) })
        }
        _ => Err(Error::MoveNotEnding { name: name.to_owned(), after: END_PATIENCE }),
    }
}

/// Waits a step for news of the move; `last` is what was heard of it before.
fn step(
    name: &str,
    stream: &mut EventStream,
    is_incoming: bool,
    last: Option<&MoveStatus>,
) -> Result<Option<MoveStatus>, Error> {
    match stream.next(STEP)? {
        // The last word on its arrival may come when a guest is already on its way again.
        Heard::Event(Record { event: Event::Migration(status), .. }) if status.incoming != is_incoming => Ok(None),
        Heard::Event(record) => news(name, record.event, last),
        Heard::Nothing => Ok(None),
        Heard::Closed => Err(ClientError::Gone { name: name.to_owned() }.into()),
    }
}

/// What `event` says of the move. A VM that ended because it moved has moved, also where the move's own last event was lost.
fn news(name: &str, event: Event, last: Option<&MoveStatus>) -> Result<Option<MoveStatus>, Error> {
    let (kind, peer, ended) = match event {
        Event::Migration(status) => return Ok(Some(*status)),
        Event::Ended(Ended::Moved(to)) => (Kind::Live, to.clone(), Ended::Moved(to)),
        Event::Ended(Ended::Saved(file)) => (Kind::Save, file.clone(), Ended::Saved(file)),
        Event::Ended(ended) => return Err(Error::Ended { name: name.to_owned(), ended }),
        _ => return Ok(None),
    };
    let mut status = last.cloned().unwrap_or_else(|| MoveStatus::begin(Uuid::nil(), 0, kind, peer, 0));
    (status.phase, status.percent, status.guest) = (Phase::Done, 100, ended.to_string());
    Ok(Some(status))
}

/// After the end of a move: where the guest is elsewhere, what is left of the VM here must have ended and its name be free, so that
/// it can come back at once; where the move broke off, the guest may have ended, and the move for that.
fn settle(name: &str, status: &MoveStatus, stream: &mut EventStream) -> Result<(), Error> {
    let broke = status.phase == Phase::Failed && matches!(status.failure, Some(Failure::Broken) | None);
    let patience = match status.leaves() {
        true => END_PATIENCE,
        false if broke => END_GRACE,
        false => return Ok(()),
    };
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        match stream.next(STEP) {
            Ok(Heard::Event(record)) => match record.event {
                Event::Ended(ended) if broke => return Err(Error::Ended { name: name.to_owned(), ended }),
                Event::Ended(_) => return Ok(()),
                _ => {}
            },
            Ok(Heard::Closed) | Err(_) => return Ok(()),
            Ok(Heard::Nothing) => {}
        }
    }
    Ok(())
}

/// What the move came to, as a result or an error.
fn conclude(name: &str, status: &MoveStatus, output: Output) -> Result<(), Error> {
    match status.phase {
        Phase::Done => output.line(status, |status| summary(name, status)),
        _ => Err(Error::Move { name: name.to_owned(), status: Box::new(status.clone()) }),
    }
}

/// What a move that is done came to, for people.
pub fn summary(name: &str, status: &MoveStatus) -> String {
    let MoveStatus { kind, peer, ram, total_time, downtime, expected_downtime, downtime_parts, .. } = status;
    let mut text = match (kind, status.incoming) {
        (Kind::Save, _) => format!("{name} is saved in {peer}\n"),
        (Kind::Restore, _) => format!("{name} was restored from {peer}\n"),
        (_, true) => format!("{name} came here from {peer} by {kind}\n"),
        (_, false) => format!("{name} runs at {peer}, and is gone from here\n"),
    };
    let mut row = |label: &str, value: String| {
        let _ = writeln!(text, "  {label:<12}{value}"); // writing to a String cannot fail
    };
    row("total time", millis(*total_time));
    if let Some(measured) = downtime {
        let foretold = expected_downtime.map_or(String::new(), |expected| format!(" ({} expected)", millis(expected)));
        row("downtime", format!("{}{foretold}", millis(*measured)));
    }
    if let Some(parts) = downtime_parts {
        row("", downtime_line(parts));
    }
    if let Some(stall) = &status.precopy_stall {
        let (longest, total) = (stall.longest_us as f64 / 1000.0, stall.total_us as f64 / 1000.0);
        row("stall", format!("while it ran, at most {longest:.2} ms at a stretch, {total:.2} ms in all"));
    }
    row(
        "memory",
        format!(
            "{} carried in {} pass{}, {} of RAM, {} zero pages",
            format_size(ram.transferred),
            ram.dirty_sync_count.max(1),
            if ram.dirty_sync_count > 1 { "es" } else { "" },
            format_size(ram.total),
            ram.duplicate
        ),
    );
    if let Some(verdict) = &status.verdict {
        row("verdict", verdict.clone());
    }
    for warning in &status.warnings {
        row("warning", warning.clone());
    }
    text
}

fn downtime_line(parts: &Downtime) -> String {
    let Downtime { stop_us, pages_us, state_us, restore_us, hand_over_us, start_us, .. } = *parts;
    let named = [
        ("stop", stop_us),
        ("pages", pages_us),
        ("state", state_us),
        ("restore", restore_us),
        ("hand-over", hand_over_us),
        ("start", start_us),
    ];
    let parts: Vec<_> = named.iter().map(|(name, us)| format!("{name} {:.2}", *us as f64 / 1000.0)).collect();
    format!("{} ms", parts.join(" + "))
}

/// Milliseconds in a unit that reads well.
pub fn millis(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{ms} ms"),
        _ => format!("{:.1} s", ms as f64 / 1000.0),
    }
}

/// One line about a move under way.
pub fn line(status: &MoveStatus) -> String {
    let MoveStatus { phase, percent, ram, expected_downtime, verdict, .. } = status;
    let mut text = format!("{} {percent}%", phase.word());
    let mut add = |part: String| {
        let _ = write!(text, ", {part}"); // writing to a String cannot fail
    };
    if ram.dirty_sync_count > 1 {
        add(format!("pass {}", ram.dirty_sync_count));
    }
    if ram.transferred > 0 {
        add(format!("{} carried", format_size(ram.transferred)));
    }
    if ram.remaining > 0 {
        add(format!("{} left", format_size(ram.remaining)));
    }
    if ram.bandwidth > 0 {
        add(format!("{}/s", format_size(ram.bandwidth)));
    }
    if ram.dirty_rate > 0 {
        add(format!("dirties {}/s", format_size(ram.dirty_rate)));
    }
    if let Some(expected) = expected_downtime {
        add(format!("{} standstill expected", millis(*expected)));
    }
    if let Some(verdict) = verdict {
        add(verdict.clone());
    }
    text
}

/// Where progress goes.
enum Display {
    Bar(ProgressBar),
    Lines { phase: Option<Phase>, at: Instant, is_foretold: bool },
    Json,
}

impl Display {
    fn new(output: Output) -> Self {
        if output.json {
            return Self::Json;
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines { phase: None, at: Instant::now(), is_foretold: false };
        }
        let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}%  {wide_msg}") {
            bar.set_style(style);
        }
        Self::Bar(bar)
    }

    fn show(&mut self, status: &MoveStatus) -> Result<(), Error> {
        match self {
            Self::Bar(bar) => {
                bar.set_position(status.percent.into());
                bar.set_message(line(status));
            }
            Self::Lines { phase, at, is_foretold } => {
                // A standstill is foretold before it begins, however soon that is.
                let foretells = status.expected_downtime.is_some() && !*is_foretold;
                if foretells || *phase != Some(status.phase) || at.elapsed() >= LINE_INTERVAL {
                    (*phase, *at) = (Some(status.phase), Instant::now());
                    *is_foretold |= foretells;
                    eprintln!("{}", line(status));
                }
            }
            // The last one is the result, which is printed by itself.
            Self::Json if status.phase.is_over() => {}
            Self::Json => {
                let text = serde_json::to_string(status).map_err(|error| Error::Output(error.into()))?;
                print(&(text + "\n"))?;
            }
        }
        Ok(())
    }

    fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.println(text),
            Self::Lines { .. } | Self::Json => eprintln!("{text}"),
        }
    }

    fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_whose_last_event_was_lost_is_done_all_the_same() {
        let begun = MoveStatus::begin(Uuid::from_u128(1), 2, Kind::Quick, "tcp:b:7300".into(), 1 << 20);
        let ended = || Event::Ended(Ended::Moved("tcp:b:7300".into()));
        let heard = news("web", ended(), Some(&begun)).unwrap().unwrap();
        assert_eq!((heard.phase, heard.kind, heard.id), (Phase::Done, Kind::Quick, begun.id));
        let unheard = news("web", ended(), None).unwrap().unwrap();
        assert!(unheard.leaves() && summary("web", &unheard).starts_with("web runs at tcp:b:7300"));
        let saved = news("web", Event::Ended(Ended::Saved("/f".into())), None).unwrap().unwrap();
        assert!(summary("web", &saved).starts_with("web is saved in /f"));
    }

    #[test]
    fn a_guest_that_powers_off_on_its_way_is_gone() {
        let error = news("web", Event::Ended(Ended::PoweredOff), None).unwrap_err();
        assert_eq!(error.exit_code(), crate::exit::GUEST_LOST);
        assert!(error.report().contains("the guest has powered off\n  guest: it is gone"), "{}", error.report());
    }
}
