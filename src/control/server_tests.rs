//! Both ends of a control socket, over a real one.

use super::super::client::{Client, Error, EventStream, Heard};
use super::super::fake::Fake;
use super::*;
use crate::config::SerialConfig;
use crate::control::machine::Ended;
use crate::events::Event;
use crate::registry::Registry;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

const LONG: Duration = Duration::from_secs(10);

struct Setup {
    registry: Registry,
    machine: Arc<Fake>,
    events: Arc<EventBus>,
    server: Option<Server>,
    _dir: tempfile::TempDir,
}

fn setup(state: RunState) -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::at(dir.path().to_owned());
    let machine = Arc::new(Fake::new(state));
    let events = Arc::new(EventBus::new("web"));
    let config = VmConfig {
        name: "web".into(),
        kernel: "/boot/vmlinuz".into(),
        initrd: None,
        cmdline: String::new(),
        memory_bytes: 64 << 20,
        cpus: 2,
        cpu: sterna_arch::CpuModel::Host,
        disks: Vec::new(),
        nets: vec![crate::config::NetConfig {
            id: "net0".into(),
            tap: "t".into(),
            create: false,
            mac: [2, 0, 0, 0, 0, 1],
        }],
        vsock: None,
        serial: SerialConfig::File("/tmp/x".into()),
    };
    let subject = Subject { config, machine: machine.clone(), events: events.clone() };
    let server = Some(Server::start(&registry.socket("web"), subject).unwrap());
    Setup { registry, machine, events, server, _dir: dir }
}

impl Setup {
    fn client(&self) -> Client {
        Client::connect(&self.registry, "web", LONG).unwrap()
    }

    fn raw(&self) -> UnixStream {
        UnixStream::connect(self.registry.socket("web")).unwrap()
    }
}

fn event_of(stream: &mut EventStream) -> Event {
    match stream.next(LONG).unwrap() {
        Heard::Event(record) => record.event,
        other => panic!("expected an event, got {other:?}"),
    }
}

#[test]
fn a_client_sees_and_changes_the_machine() {
    let setup = setup(RunState::Running);
    let mut client = setup.client();
    assert_eq!(client.pid(), Some(std::process::id()));
    let show = client.show(LONG).unwrap();
    assert_eq!((show.name.as_str(), show.pid), ("web", std::process::id()));
    assert_eq!(show.status, setup.machine.status());
    assert_eq!(show.config.nets[0].mac, [2, 0, 0, 0, 0, 1]);
    assert_eq!(client.change(Request::Pause).unwrap(), RunState::Running);
    assert_eq!(client.change(Request::Pause).unwrap(), RunState::Paused);
    assert_eq!(client.change(Request::Resume).unwrap(), RunState::Paused);
    assert_eq!(client.change(Request::Balloon { target_bytes: 1 << 20 }).unwrap(), RunState::Running);
    assert_eq!(setup.machine.lock().balloon_bytes, 1 << 20);
    assert_eq!(client.change(Request::Kill).unwrap(), RunState::Running);
    assert_eq!(setup.machine.lock().asked, ["pause", "pause", "resume", "kill"]);
}

#[test]
fn a_refusal_is_told_in_the_machines_words() {
    let setup = setup(RunState::Paused);
    let mut client = setup.client();
    let refusal = |error| match error {
        Error::Refused { source, .. } => (source.kind, source.text),
        other => panic!("expected a refusal, got {other}"),
    };
    let (kind, text) = refusal(client.change(Request::PowerButton).unwrap_err());
    assert_eq!((kind, text.as_str()), (RefusalKind::Paused, "the guest is paused"));
    let (kind, text) = refusal(client.change(Request::Balloon { target_bytes: 1 << 40 }).unwrap_err());
    assert_eq!(kind, RefusalKind::Refused);
    assert!(text.contains("larger than the guest's 67108864"), "{text}");
    setup.machine.kill();
    let (kind, _) = refusal(client.change(Request::Resume).unwrap_err());
    assert_eq!(kind, RefusalKind::Ended);
    assert_eq!(client.show(LONG).unwrap().status.state, RunState::Ended);
}

#[test]
fn events_reach_every_listener_and_the_last_one_before_the_end() {
    let mut setup = setup(RunState::Running);
    let mut listeners = [setup.client().listen().unwrap(), setup.client().listen().unwrap()];
    setup.events.publish(Event::Paused);
    setup.events.publish(Event::Ended(Ended::PoweredOff));
    setup.events.close();
    let begin = Instant::now();
    drop(setup.server.take());
    assert!(begin.elapsed() < FAREWELL, "the server waited for clients that had been told all");
    for listener in &mut listeners {
        assert_eq!(event_of(listener), Event::Paused);
        assert_eq!(event_of(listener), Event::Ended(Ended::PoweredOff));
        assert!(matches!(listener.next(LONG).unwrap(), Heard::Closed));
    }
}

#[test]
fn an_idle_client_does_not_delay_the_end() {
    let mut setup = setup(RunState::Running);
    let mut idle = setup.client();
    idle.show(LONG).unwrap();
    let begin = Instant::now();
    drop(setup.server.take());
    assert!(begin.elapsed() < FAREWELL);
    assert!(matches!(idle.show(LONG), Err(Error::Gone { .. } | Error::Broken { .. })));
}

#[test]
fn only_so_many_clients_are_taken_and_places_become_free() {
    let setup = setup(RunState::Running);
    let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| setup.client()).collect();
    clients.iter_mut().for_each(|client| drop(client.show(LONG).unwrap()));
    match setup.client().show(LONG).unwrap_err() {
        Error::Refused { source, .. } => assert_eq!(source.kind, RefusalKind::Busy),
        other => panic!("expected a refusal, got {other}"),
    }
    drop(clients.pop());
    let deadline = Instant::now() + LONG;
    while setup.client().show(LONG).is_err() {
        assert!(Instant::now() < deadline, "the place of a client that left did not become free");
    }
}

#[test]
fn a_listener_that_leaves_gives_its_place_back() {
    let setup = setup(RunState::Running);
    drop(setup.client().listen().unwrap());
    let clients = &setup.server.as_ref().unwrap().clients;
    let mut state = clients.lock();
    let deadline = Instant::now() + LONG;
    while !state.streams.is_empty() {
        assert!(Instant::now() < deadline, "a listener that left still has its place");
        state = clients.left.wait_timeout(state, LONG).unwrap().0;
    }
}

#[test]
fn rubbish_is_answered_and_does_no_harm() {
    let setup = setup(RunState::Running);
    let ask = |bytes: &[u8]| {
        let mut raw = setup.raw();
        raw.set_read_timeout(Some(LONG)).unwrap();
        raw.write_all(bytes).unwrap();
        raw.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        raw.read_to_string(&mut text).map(|_| text).unwrap_or_default()
    };
    assert!(ask(b"\xff\xfe\n").contains(r#""error":{"kind":"bad-request""#));
    assert!(ask(b"{\"version\":1,\"request\":{\"balloon\":{\"target_bytes\":-1}}}\n").contains("invalid value"));
    assert!(ask(b"{\"version\":9,\"request\":\"show\"}\n").contains(r#""kind":"version""#));
    assert_eq!(ask(b"{\"version\":1,\"request\":\"show\"}"), "", "half a line was answered");
    assert!(ask(&[b'['; 60_000]).is_empty());
    let deep = [vec![b'['; 60_000], vec![b'\n']].concat();
    assert!(ask(&deep).contains("bad-request"));
    assert!(ask(&vec![b'x'; MAX_REQUEST_BYTES]).contains("a request has at most 65536 bytes"));
    setup.client().show(LONG).unwrap();
}

#[test]
fn only_the_owner_may_use_the_socket() {
    let setup = setup(RunState::Running);
    let mode = std::fs::metadata(setup.registry.socket("web")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_client_tells_what_is_missing() {
    let setup = setup(RunState::Running);
    let connect = |name: &str| Client::connect(&setup.registry, name, Duration::from_millis(50)).unwrap_err();
    assert!(matches!(connect("db"), Error::NoSuchVm { .. }));
    assert!(matches!(connect("a/b"), Error::BadName(_)));
    drop(UnixListener::bind(setup.registry.socket("crashed")).unwrap());
    assert!(matches!(connect("crashed"), Error::Gone { .. }));
}

#[test]
fn a_vm_that_stands_still_is_not_waited_for() {
    let setup = setup(RunState::Running);
    let listener = listen_at(&setup.registry.socket("hung")).unwrap();
    listen(&listener, 0).unwrap();
    let patience = Duration::from_millis(50);
    let mut first = Client::connect(&setup.registry, "hung", patience).unwrap();
    assert!(matches!(first.show(patience), Err(Error::NotAnswering { pid: Some(_), .. })));
    let mut clients = Vec::new();
    let error = loop {
        match Client::connect(&setup.registry, "hung", patience) {
            Ok(client) => clients.push(client),
            Err(error) => break error,
        }
        assert!(clients.len() < 10, "the backlog never fills up");
    };
    assert!(matches!(error, Error::NotAnswering { .. }), "{error}");
}
