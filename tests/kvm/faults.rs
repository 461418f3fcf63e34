//! What may go wrong while a VM moves: processes killed and connections cut at every word of the protocol. Afterwards the guest
//! runs in one place or, where that was announced, in none, and never in two.

use crate::cgroup::MemoryGroup;
use crate::host_pair::{ANY_PORT, NAME, Pair, Receiver, assert_says, await_equal, moved, tick, verify};
use crate::vm::{Host, Vm};
use crate::wire::{Wire, Word};
use rustix::process::Signal;
use std::sync::Mutex;
use std::{fs, thread};

/// What the test guest does: it writes, so that what is lost shows.
const GUEST: &str = "touch=16 dirty=8 rate=50 pattern=rand tick=20";
/// The same guest when it only reads.
const STILL: &str = "touch=16 tick=20";
const PAGES: u64 = 16 * 256;
const FAILED: Option<i32> = Some(1);
/// What the receiver says for a process that cannot say it.
const KILLED: &str = "the VM's process was killed by signal 9; `dmesg` tells whether memory had run out";
const REFUSED: Option<i32> = Some(3);
const DONE: Option<i32> = Some(0);
const IN_DOUBT: Option<i32> = Some(6);
const LOST: Option<i32> = Some(8);
/// Cases at one time: each has a guest and some ten processes.
const AT_ONCE: usize = 6;
/// Words before the one after which nothing comes back by itself.
const BEFORE_GO: [Word; 7] =
    [Word::Machine, Word::Ready, Word::Rehearsal, Word::Rehearsed, Word::Ram, Word::State, Word::Loaded];
/// Those that only a quick move has.
const ONLY_QUICK: [Word; 2] = [Word::Make, Word::Made];

/// Each word before Go in each mode that has it, without the first `skipped`.
fn before_go(skipped: usize) -> impl Iterator<Item = (Word, &'static str)> {
    let both = BEFORE_GO.into_iter().skip(skipped).flat_map(|word| [(word, "live"), (word, "quick")]);
    both.chain(ONLY_QUICK.map(|word| (word, "quick")))
}

/// Whether the guest stands still, and may be given away as far as anybody knows without the source, when `word` is on its way.
fn is_stopped((word, mode): (Word, &str)) -> bool {
    matches!(word, Word::State | Word::Loaded) || (mode, word) == ("quick", Word::Ram)
}

/// Tries each case, several at one time: most of what they do is to wait. Those first whose target waits for Go, which takes longest.
fn at_once(cases: impl Iterator<Item = (Word, &'static str)>, test: impl Fn(Word, &'static str) + Sync) {
    let mut cases: Vec<_> = cases.collect();
    cases.sort_by_key(|case| is_stopped(*case));
    let cases = Mutex::new(cases);
    let next = || cases.lock().unwrap().pop();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((word, mode)) = next() {
                    test(word, mode);
                }
            });
        }
    });
}

/// A move that stands at one word.
struct Stage {
    pair: Pair,
    wire: Wire,
    migrate: Vm,
}

impl Stage {
    /// A VM on A whose live move to B is held at `word`.
    fn at(word: Word) -> Self {
        Self::of(word, &["--connections", "3"])
    }

    /// The same with a move of either kind.
    fn in_mode(word: Word, mode: &str) -> Self {
        Self::of(word, &["--mode", mode, "--connections", "3"])
    }

    fn of(word: Word, more: &[&str]) -> Self {
        let pair = Pair::new();
        pair.a().boot(GUEST, &[]);
        tick(&mut pair.a().console(NAME));
        let wire = Wire::to(pair.to_b());
        wire.hold(word);
        let migrate = Vm::start(pair.a().command(&[&["migrate", NAME, &wire.address], more].concat()), "migrate");
        wire.await_held();
        Self { pair, wire, migrate }
    }

    /// The same, with nobody who waits for its end.
    fn unwatched_at(word: Word) -> (Pair, Wire) {
        let Self { pair, wire, migrate } = Self::of(word, &["--detach"]);
        let (code, said) = migrate.wait_exit();
        assert_eq!(code, DONE, "{said}");
        (pair, wire)
    }

    /// The end of the move: the command's exit code and words.
    fn end(self) -> (Pair, Wire, Option<i32>, String) {
        let (code, said) = self.migrate.wait_exit();
        (self.pair, self.wire, code, said)
    }
}

/// The guest runs at A as if nothing had been, and goes to B in a second attempt by the same receiver.
fn assert_stays_and_goes(pair: &Pair, word: Word) {
    pair.await_states(Some("running"), None);
    await_equal("the end of the move", &true, || pair.a().migration()["phase"] == "failed");
    let mut console = pair.a().console(NAME);
    let before = tick(&mut console);
    assert!(tick(&mut console) > before, "{word:?}");
    pair.go(&["--verify"]);
    assert_whole(&mut pair.b().console(NAME));
}

fn assert_whole(console: &mut Vm) {
    verify(console, PAGES);
    tick(console);
}

/// Before Go a cut leaves the guest where it was, nothing at the target, and a receiver that takes the same VM at once.
pub fn a_cut_before_go_changes_nothing() {
    for (word, mode) in before_go(0) {
        let stage = Stage::in_mode(word, mode);
        stage.wire.cut();
        let (pair, _wire, code, said) = stage.end();
        assert_eq!(code, FAILED, "{word:?}: {said}");
        let parts = ["came to nothing", "guest: The guest runs here; it cannot start at the target any more."];
        assert_says(&said, &parts);
        assert_stays_and_goes(&pair, word);
    }
}

/// Nor does the end of the target's process.
pub fn a_target_killed_before_go_changes_nothing() {
    for (word, mode) in before_go(1) {
        let stage = Stage::in_mode(word, mode);
        stage.pair.await_states(stage.pair.states()[0].as_deref(), Some("incoming"));
        stage.pair.b().kill(NAME);
        // What the target had said before still arrives.
        stage.wire.release();
        let (pair, _wire, code, said) = stage.end();
        assert!(matches!(code, FAILED | REFUSED), "{word:?}: {code:?} {said}");
        assert_says(&said, &["guest: The guest runs here; it cannot start at the target any more."]);
        // Loaded still arrives, and Go finds nobody.
        assert!(word == Word::Loaded || said.contains(KILLED), "{word:?}: {said}");
        assert_stays_and_goes(&pair, word);
    }
}

/// A source that is killed before Go, with any of its words on the way to the target or back, takes the guest with it, as a crash
/// does; nothing is left at the target, which takes the same VM again, and its name is free here.
pub fn a_source_killed_before_go_leaves_nothing_at_the_target() {
    at_once(before_go(0), |word, mode| {
        let stage = Stage::in_mode(word, mode);
        stage.pair.a().kill(NAME);
        stage.wire.release();
        let (pair, _wire, code, said) = stage.end();
        assert_eq!(code, Some(7), "{word:?}: {said}");
        assert_says(&said, &["has gone without a farewell", "guest: it is gone with its process"]);
        // The target had begun with it, and has said that it comes to nothing.
        let log = pair.b().path("vm.log");
        await_equal("a word in the log at B", &true, || fs::metadata(&log).is_ok_and(|log| log.len() > 0));
        // After the record was written it may have been given away, as far as anybody knows here.
        let recorded = is_stopped((word, mode)).then_some("in-doubt");
        pair.await_states(recorded, None);
        if recorded.is_some() {
            pair.a().ok(&["migration", "resolve", NAME, "--here"]);
        }
        pair.a().boot(GUEST, &[]);
        tick(&mut pair.a().console(NAME));
        pair.go(&[]);
        assert_whole(&mut pair.b().console(NAME));
    });
}

/// A bit that is turned on the way is found, whichever side it is for: the move comes to nothing, the guest stays.
pub fn a_spoiled_word_before_go_changes_nothing() {
    for (word, mode) in before_go(0) {
        let pair = Pair::new();
        pair.a().boot(STILL, &[]);
        tick(&mut pair.a().console(NAME));
        let wire = Wire::to(pair.to_b());
        wire.spoil(word);
        let words = ["migrate", NAME, &wire.address, "--mode", mode, "--connections", "3", "--verify"];
        let ended = pair.a().sterna(&words);
        let said = String::from_utf8(ended.stderr).unwrap();
        // What the target finds damaged it refuses.
        assert!(matches!(ended.status.code(), FAILED | REFUSED), "{word:?}: {:?} {said}", ended.status);
        assert!(wire.seen().contains(&word), "{word:?} never came: {said}");
        let found = if word == Word::Ram { "differ" } else { "checksum" };
        assert_says(&said, &["came to nothing", found, "guest: The guest runs here;"]);
        assert_stays_and_goes(&pair, word);
    }
}

/// After Go the source asks on a new connection, as after a cut.
pub fn a_spoiled_word_after_go_is_mended_by_asking() {
    for (word, mode) in [(Word::Go, "live"), (Word::Go, "quick"), (Word::Running, "live"), (Word::Running, "quick")] {
        let stage = Stage::in_mode(word, mode);
        stage.wire.spoil(word);
        stage.wire.release();
        let (pair, wire, code, said) = stage.end();
        assert_eq!(code, DONE, "{word:?}: {said}");
        assert!(wire.seen().contains(&Word::Ask), "{:?}", wire.seen());
        pair.await_states(None, Some("running"));
        assert_whole(&mut pair.b().console(NAME));
    }
}

/// A target that has not the memory that the guest turns out to need is ended by its kernel in mid-pass: the guest stays, and goes
/// when there is room. Needs root.
pub fn a_target_out_of_memory_changes_nothing() {
    const TOUCHED_MIB: u64 = 256;
    for mode in ["live", "quick"] {
        let group = MemoryGroup::new((TOUCHED_MIB / 2) << 20);
        let wrapper = group.wrapper();
        let b = Host::within(&wrapper.each_ref().map(String::as_str));
        let pair = Pair::of([Host::new(), b]);
        pair.a().boot(&format!("touch={TOUCHED_MIB} dirty=1 rate=5 tick=20"), &["--memory", "512M"]);
        let mut console = pair.a().console(NAME);
        tick(&mut console);
        let ended = pair.a().sterna(&["migrate", NAME, pair.to_b(), "--mode", mode]);
        let said = String::from_utf8(ended.stderr).unwrap();
        assert!(matches!(ended.status.code(), FAILED | REFUSED), "{mode}: {:?} {said}", ended.status);
        assert_says(
            &said,
            &["came to nothing", KILLED, "guest: The guest runs here; it cannot start at the target any more."],
        );
        pair.await_states(Some("running"), None);
        tick(&mut console);
        drop(console);
        group.set_limit((TOUCHED_MIB * 4) << 20);
        pair.go(&["--mode", mode, "--verify"]);
        verify(&mut pair.b().console(NAME), TOUCHED_MIB * 256);
        pair.b().ok(&["stop", NAME, "--force"]);
    }
}

/// The receiver may die while a machine comes: it comes all the same.
pub fn a_receiver_killed_on_the_way_does_not_end_the_move() {
    for word in [Word::Ram, Word::State, Word::Running] {
        let stage = Stage::at(word);
        stage.pair.receivers[1].process.signal(Signal::KILL);
        stage.wire.release();
        let (mut pair, _wire, code, said) = stage.end();
        assert_eq!(code, DONE, "{word:?}: {said}");
        pair.await_states(None, Some("running"));
        assert_whole(&mut pair.b().console(NAME));
        pair.receivers[1] = Receiver::start(pair.b(), ANY_PORT, &[]);
        pair.leave(1, &[]);
        pair.go(&[]);
    }
}

/// Go is lost with its connection: the source asks on a new one, and the guest starts at the target.
pub fn a_cut_at_go_is_mended_by_asking() {
    for word in [Word::Go, Word::Running] {
        let stage = Stage::at(word);
        stage.wire.cut();
        let (pair, wire, code, said) = stage.end();
        assert_eq!(code, DONE, "{word:?}: {said}");
        assert!(wire.seen().contains(&Word::Ask), "{:?}", wire.seen());
        pair.await_states(None, Some("running"));
        assert_whole(&mut pair.b().console(NAME));
        pair.leave(1, &[]);
    }
}

/// The target dies before it hears Go: its keeper knows that it never started, and the guest goes on at the source.
pub fn a_target_killed_at_go_gives_the_guest_back() {
    let stage = Stage::at(Word::Go);
    stage.pair.b().kill(NAME);
    let (pair, _wire, code, said) = stage.end();
    assert_eq!(code, FAILED, "{said}");
    assert_says(&said, &["guest: The guest runs here; it cannot start at the target any more."]);
    assert_stays_and_goes(&pair, Word::Go);
}

/// The target dies after it has started the guest: only a person can decide whether the older copy goes on.
pub fn a_target_killed_after_its_start_is_left_to_a_person() {
    for (resolution, states) in [("--here", [Some("running"), None]), ("--there", [None, None])] {
        let (pair, _wire) = Stage::unwatched_at(Word::Running);
        await_equal("the VM at B", &Some("running".to_owned()), || pair.b().state(NAME));
        pair.b().kill(NAME);
        let ended = "The guest ran at the target and its process there has ended; the copy that stands still here is \
                     older than its disks.";
        await_equal("the guest", &ended.to_owned(), || pair.a().migration()["guest"].as_str().unwrap().to_owned());
        assert_eq!(pair.states(), [Some("in-doubt".to_owned()), None]);
        let refused = pair.a().fails(1, &["resume", NAME]);
        assert_says(&refused, &["was handed over and may run elsewhere"]);
        pair.a().ok(&["migration", "resolve", NAME, resolution]);
        pair.await_states(states[0], states[1]);
        if resolution == "--here" {
            assert_stays_and_goes(&pair, Word::Running);
        }
    }
}

/// No word comes back after Go: the source stands still and says so, and learns by itself when the way is mended.
pub fn a_source_in_doubt_learns_that_the_guest_runs_there() {
    let stage = Stage::at(Word::Running);
    stage.wire.set_down(true);
    stage.wire.cut();
    let (pair, wire, code, said) = stage.end();
    assert_eq!(code, IN_DOUBT, "{said}");
    assert_says(&said, &["guest: The guest stands still here and may run at the target"]);
    assert_says(&said, &["sterna migration resolve vm --here", "sterna migration resolve vm --there"]);
    assert_eq!(pair.states(), [Some("in-doubt"), Some("running")].map(|state| state.map(str::to_owned)));
    assert_eq!(pair.a().migration()["phase"], "in-doubt");
    let late = pair.a().fails(1, &["migration", "cancel", NAME]);
    assert_says(&late, &["too late to cancel"]);
    wire.set_down(false);
    pair.await_states(None, Some("running"));
    assert_whole(&mut pair.b().console(NAME));
    let record = pair.a().ok(&["migration", "status", NAME]);
    assert_says(&record, &["vm moved to ", "nothing of it is left here"]);
}

/// A loaded target that never hears Go discards what it has, and the source takes the guest back as soon as it hears that.
pub fn a_target_that_hears_no_go_discards() {
    let (pair, wire) = Stage::unwatched_at(Word::Go);
    wire.set_down(true);
    wire.cut();
    await_equal("the VM at B", &None, || pair.b().state(NAME));
    assert_eq!(pair.a().state(NAME).as_deref(), Some("in-doubt"));
    wire.set_down(false);
    assert_stays_and_goes(&pair, Word::Go);
}

/// A restarted receiver knows nothing, which decides nothing: a person does.
pub fn a_receiver_killed_at_go_leaves_the_doubt_to_a_person() {
    let (mut pair, wire) = Stage::unwatched_at(Word::Go);
    pair.receivers[1].process.signal(Signal::KILL);
    wire.cut();
    // Nobody can come back to a target without its receiver: it discards.
    await_equal("the VM at B", &None, || pair.b().state(NAME));
    let address = pair.to_b().to_owned();
    pair.receivers[1] = Receiver::start(pair.b(), &address, &[]);
    // An answer that is none: the receiver knows nothing of this move.
    await_equal("an answer", &true, || wire.seen().contains(&Word::Answer));
    pair.a().await_phase("in-doubt");
    pair.a().ok(&["migration", "resolve", NAME, "--here"]);
    assert_stays_and_goes(&pair, Word::Go);
}

/// A source that dies once Go is on its way, or in doubt, leaves the guest where it runs, and a record that says what is to be looked at.
pub fn a_source_killed_from_go_on_leaves_one_guest() {
    for (word, mode) in [Word::Go, Word::Running].into_iter().flat_map(|word| [(word, "live"), (word, "quick")]) {
        let stage = Stage::in_mode(word, mode);
        if word == Word::Running {
            stage.pair.await_states(stage.pair.states()[0].as_deref(), Some("running"));
        }
        stage.pair.a().kill(NAME);
        // What it had said still arrives.
        stage.wire.release();
        let (pair, wire, code, said) = stage.end();
        assert_eq!(code, Some(7), "{word:?}: {said}");
        pair.await_states(Some("in-doubt"), Some("running"));
        let record = pair.a().ok(&["migration", "status", NAME]);
        assert_says(&record, &["was on its way to", "resolve vm --there"]);
        pair.a().ok(&["migration", "resolve", NAME, "--there"]);
        pair.await_states(None, Some("running"));
        drop(wire);
        assert_whole(&mut pair.b().console(NAME));
        pair.leave(1, &["--mode", mode]);
    }
}

/// In doubt, `stop --force` ends what is left here.
pub fn force_ends_a_copy_in_doubt() {
    let stage = Stage::at(Word::Running);
    stage.wire.set_down(true);
    stage.wire.cut();
    stage.pair.a().await_phase("in-doubt");
    stage.pair.a().ok(&["stop", NAME, "--force"]);
    let (pair, _wire, code, said) = stage.end();
    assert_eq!(code, LOST, "{said}");
    assert_says(&said, &["guest: The guest stands still here and may run at the target", "The copy here was ended."]);
    // The record stays: nobody has said where it runs.
    pair.await_states(Some("in-doubt"), Some("running"));
    pair.a().ok(&["migration", "resolve", NAME, "--there"]);
    pair.await_states(None, Some("running"));
    assert_whole(&mut pair.b().console(NAME));
}

/// Whoever talks nonsense to a receiver, or nothing, is told so or cut off, and machines come meanwhile.
pub fn a_receiver_outlives_its_peers() {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::Duration;
    use sterna_migration::wire::frame::{FrameKind, Header};
    use sterna_migration::wire::{Preamble, Purpose};
    let pair = Pair::new();
    pair.a().boot(GUEST, &[]);
    let port = pair.to_b().strip_prefix("tcp:").unwrap();
    let preamble = |purpose, id| Preamble::new(purpose, 0, uuid::Uuid::from_u128(id), 1).encode().to_vec();
    let claim = |length, kind| Header { kind, flags: 0, count: 0, length }.encode().to_vec();
    let message = |id, rest: &[u8]| [&preamble(Purpose::Move, id)[..], rest].concat();
    let mut version = preamble(Purpose::Move, 9);
    version[8] = 77;
    let silent: Vec<_> = (0..40).map(|_| TcpStream::connect(port).unwrap()).collect();
    let slow = std::thread::spawn({
        let (mut peer, bytes) = (TcpStream::connect(port).unwrap(), preamble(Purpose::Join, 7));
        // How many bytes it gets rid of, one each half second, before it is sent away.
        move || {
            peer.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let mut goes_on = |byte: &u8| {
                let sent = peer.write_all(&[*byte]).is_ok();
                // Nothing comes as long as it is listened to: neither a reason nor an end.
                sent && matches!(peer.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
            };
            (bytes.len(), bytes.iter().take_while(|byte| goes_on(byte)).count())
        }
    });
    for (bytes, part) in [
        (vec![0x55; 4096], "not"),
        (b"GET / HTTP/1.1\r\nHost: sterna.example.org\r\nAccept: */*\r\n\r\n".to_vec(), "not"),
        (version, "version"),
        (message(1, &[0xff; 64]), ""),
        (message(2, &claim(u64::MAX, FrameKind::Message)), ""),
        (message(3, &claim((4 << 20) + 9, FrameKind::Message)), "more than 4194312"),
        (message(4, &[&claim(30, FrameKind::Message)[..], &[0x11; 30]].concat()), "checksum"),
        (preamble(Purpose::Join, 5), "no move"),
        (preamble(Purpose::File, 6), "sterna restore"),
        ([preamble(Purpose::Ask, 8), claim(257, FrameKind::Message)].concat(), "a question of 257 bytes"),
    ] {
        let mut peer = TcpStream::connect(port).unwrap();
        peer.set_read_timeout(Some(crate::vm::LONG)).unwrap();
        peer.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        // A reset after the answer is an end too.
        let _end = peer.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.contains(part), "{part:?} is not in {answer:?}");
    }
    assert_eq!(pair.b().state(NAME), None);
    tick(&mut pair.a().console(NAME));
    pair.go(&["--verify"]);
    let (all, sent) = slow.join().unwrap();
    assert!(sent < all, "a peer that sends a byte each half second was listened to for all of {all}");
    for mut peer in silent {
        peer.set_read_timeout(Some(crate::vm::LONG)).unwrap();
        assert!(
            !matches!(peer.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
            "still there"
        );
    }
    let others = moved(pair.b(), &pair.receivers[0].address, &[]);
    assert_eq!(others["phase"], "done");
}
