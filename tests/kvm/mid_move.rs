//! What a guest and its user do while it moves: each has its defined end.

use crate::host_pair::{NAME, Pair, assert_says, await_equal, tick, verify};
use crate::vm::Vm;
use crate::wire::{Wire, Word};

/// Pages of the 16 MiB that the guest writes.
const PAGES: u64 = 16 * 256;

/// A live move that stands at `word`, with the guest's console.
fn moving(word: Word, more: &[&str]) -> (Pair, Wire, Vm, Vm) {
    let pair = Pair::new();
    pair.a().boot("touch=16 dirty=4 tick=20 button", &[]);
    let mut console = pair.a().console(NAME);
    tick(&mut console);
    let wire = Wire::to(pair.to_b());
    wire.hold(word);
    let migrate = Vm::start(pair.a().command(&[&["migrate", NAME, &wire.address], more].concat()), "migrate");
    wire.await_held();
    (pair, wire, migrate, console)
}

/// The guest ends or begins anew at the source: the move is off, and nothing is left at the target.
pub fn a_guest_that_ends_in_mid_move_ends_here() {
    for (key, code, said_of_it, state) in [
        ("q", 8, "the guest has powered off", None),
        ("p", 8, "the guest's kernel has panicked", None),
        ("t", 8, "the guest has stopped on a triple fault", None),
        ("r", 1, "the guest has rebooted", Some("running")),
    ] {
        for word in [Word::Ready, Word::Ram] {
            let (pair, wire, migrate, mut console) = moving(word, &[]);
            console.type_in(key);
            let (found, said) = migrate.wait_exit();
            assert_eq!(found, Some(code), "{key} at {word:?}: {said}");
            assert_says(&said, &[said_of_it]);
            let guest = format!("guest: It was moved no further: {said_of_it}");
            assert_says(&said, &[&guest]);
            wire.release();
            pair.await_states(state, None);
            if state.is_some() {
                console.wait_for("Sterna-guest ready");
                tick(&mut console);
                pair.go(&[]);
                verify(&mut pair.b().console(NAME), PAGES);
            }
        }
    }
}

/// A user may pause and resume a guest whose memory is being copied; paused, it arrives paused.
pub fn a_guest_paused_in_mid_move_arrives_paused() {
    for (resumed, state) in [(true, "running"), (false, "paused")] {
        let (pair, wire, migrate, console) = moving(Word::Ram, &[]);
        pair.a().ok(&["pause", NAME]);
        if resumed {
            pair.a().ok(&["resume", NAME]);
        }
        drop(console);
        wire.release();
        let (code, said) = migrate.wait_exit();
        assert_eq!(code, Some(0), "{said}");
        pair.await_states(None, Some(state));
        if !resumed {
            pair.b().ok(&["resume", NAME]);
        }
        verify(&mut pair.b().console(NAME), PAGES);
    }
}

/// One move at a time; what else is asked meanwhile is refused in words, and the move goes on.
pub fn a_second_move_is_refused() {
    for word in [Word::Ram, Word::Loaded] {
        let (pair, wire, migrate, _console) = moving(word, &[]);
        let file = pair.a().path("vm.sterna");
        for words in [&["migrate", NAME, pair.to_b()][..], &["save", NAME, &file]] {
            let said = pair.a().fails(1, words);
            assert_says(&said, &["has refused", "a live migration to tcp:", " is under way"]);
        }
        let said = pair.a().fails(1, &["migration", "resolve", NAME, "--here"]);
        assert_says(&said, &["the move is not in doubt"]);
        if word == Word::Loaded {
            assert_eq!(pair.a().state(NAME).as_deref(), Some("moving"));
            for words in [&["pause", NAME][..], &["resume", NAME], &["stop", NAME]] {
                assert_says(&pair.a().fails(1, words), &["the guest stands still, being moved"]);
            }
        }
        // At the target nobody may touch what has not come.
        assert_eq!(pair.b().state(NAME).as_deref(), Some("incoming"));
        assert_says(&pair.b().fails(1, &["resume", NAME]), &["on its way to here"]);
        wire.release();
        let (code, said) = migrate.wait_exit();
        assert_eq!(code, Some(0), "{said}");
        pair.await_states(None, Some("running"));
        verify(&mut pair.b().console(NAME), PAGES);
    }
}

/// The power button reaches a guest whose memory is being copied: it powers off here, and the move is off.
pub fn a_stop_in_mid_move_ends_the_guest_here() {
    let (pair, wire, migrate, _console) = moving(Word::Ram, &[]);
    pair.a().ok(&["stop", NAME]);
    let (code, said) = migrate.wait_exit();
    assert_ne!(code, Some(0), "{said}");
    wire.release();
    pair.await_states(None, None);
}

/// `stop --force` ends it in any phase before Go, on either side's word.
pub fn force_ends_a_guest_in_mid_move() {
    for word in [Word::Ready, Word::Ram, Word::Loaded] {
        let (pair, wire, migrate, _console) = moving(word, &[]);
        pair.a().ok(&["stop", NAME, "--force"]);
        let (code, said) = migrate.wait_exit();
        assert_ne!(code, Some(0), "{word:?}: {said}");
        wire.release();
        pair.await_states(None, None);
    }
    for word in [Word::Ram, Word::Loaded] {
        let (pair, wire, migrate, mut console) = moving(word, &[]);
        pair.b().ok(&["stop", NAME, "--force"]);
        wire.release();
        let (code, said) = migrate.wait_exit();
        assert_ne!(code, Some(0), "{word:?}: {said}");
        assert_says(&said, &["guest: The guest runs here"]);
        pair.await_states(Some("running"), None);
        tick(&mut console);
    }
}

/// A balloon's target may change while memory is copied, and goes along.
pub fn a_balloon_changed_in_mid_move_goes_along() {
    let (pair, wire, migrate, _console) = moving(Word::Ram, &[]);
    pair.a().ok(&["balloon", NAME, "8M"]);
    wire.release();
    let (code, said) = migrate.wait_exit();
    assert_eq!(code, Some(0), "{said}");
    await_equal("balloon", &(8u64 << 20).into(), || {
        pair.b().json(&["show", NAME])["status"]["balloon"]["target_bytes"].clone()
    });
}
