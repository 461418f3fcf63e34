//! The testbed itself: commands, files, links, shared storage, a crash. One boot for all of it; needs `make testbed-files`.

#![expect(clippy::unwrap_used, reason = "a test that cannot do its work has failed")]

use std::time::Duration;
use sterna_testbed::{Link, Node, Options, Result, Testbed};

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn two_hosts_do_what_an_operator_asks() -> Result<()> {
    let mut testbed = Testbed::start(&Options::default())?;
    commands(&testbed)?;
    files(&testbed)?;
    links(&testbed)?;
    storage(&testbed)?;
    crash(&mut testbed)
}

fn commands(testbed: &Testbed) -> Result<()> {
    let a = testbed.host(Node::A)?;
    let output = a.run("echo out; echo err >&2; exit 3")?;
    assert_eq!((output.status, output.stdout.as_str(), output.stderr.as_str()), (3, "out\n", "err\n"));
    assert_eq!(a.check("hostname; test -c /dev/kvm && echo kvm")?, "a\nkvm");

    let mut cat = a.spawn("cat; echo end")?;
    cat.write("through\n")?;
    assert_eq!(cat.wait_for("through", LIMIT)?, "through");
    cat.close_stdin()?;
    assert_eq!(cat.wait(LIMIT)?.stdout, "through\nend\n");

    let mut sleep = a.spawn("echo started; sleep 4242")?;
    sleep.wait_for("started", LIMIT)?;
    let error = sleep.wait(Duration::from_millis(200)).unwrap_err().to_string();
    assert!(error.contains("waited 200ms for its end") && error.ends_with("last seen: started"), "{error}");
    drop(sleep);
    // The agent kills it when it sees the connection gone: soon, not at once.
    a.check("for i in $(seq 100); do ps | grep -q 'sleep 424[2]' || exit 0; sleep 0.1; done; exit 1")?;
    Ok(())
}

fn files(testbed: &Testbed) -> Result<()> {
    let b = testbed.host(Node::B)?;
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    b.put("/data/file", &bytes)?;
    assert_eq!(b.get("/data/file")?, bytes);
    let error = b.get("/data/none").unwrap_err().to_string();
    assert!(error.contains("No such file"), "{error}");
    Ok(())
}

fn links(testbed: &Testbed) -> Result<()> {
    let (a, b) = (testbed.host(Node::A)?, testbed.host(Node::B)?);
    let mut receiver = b.spawn("guest-tool tcp-receive 9000")?;
    receiver.wait_for("listening", LIMIT)?;
    let line = a.check("guest-tool tcp-send 10.9.0.2 9000 4")?;
    assert!(line.starts_with("same "), "{line}");
    assert_eq!(receiver.wait(LIMIT)?.status, 0);

    let shown = |host: &sterna_testbed::Host| host.check("tc qdisc show dev eth1");
    testbed.shape(Link::Hosts, "netem delay 300ms")?;
    assert!(shown(&a)?.contains("netem") && shown(&b)?.contains("delay 300ms"));
    let ping = a.check("ping -c 2 10.9.0.2")?;
    let fastest: f64 = ping.rsplit_once("= ").and_then(|(_, times)| times.split('/').next()?.parse().ok()).unwrap();
    assert!(fastest >= 600.0, "300 ms each way, but {ping}");
    testbed.shape(Link::Hosts, "tbf rate 100mbit burst 64kb latency 50ms")?;
    assert!(shown(&a)?.contains("tbf") && !shown(&a)?.contains("netem"));
    testbed.unshape(Link::Hosts)?;
    assert!(!shown(&b)?.contains("tbf"));
    Ok(())
}

fn storage(testbed: &Testbed) -> Result<()> {
    let (a, b) = (testbed.host(Node::A)?, testbed.host(Node::B)?);
    a.check("echo from a >/shared/note")?;
    assert_eq!(b.check("cat /shared/note")?, "from a");
    a.check("echo lun from a | dd of=/dev/vdb bs=512 seek=2048 conv=sync oflag=direct")?;
    assert_eq!(b.check("dd if=/dev/vdb bs=512 skip=2048 count=1 iflag=direct | tr -d '\\000'")?, "lun from a");
    Ok(())
}

fn crash(testbed: &mut Testbed) -> Result<()> {
    let a = testbed.host(Node::A)?;
    a.check("echo kept >/data/kept && sync")?;
    let mut sleep = a.spawn("sleep 100000")?;
    testbed.kill(Node::A)?;
    let error = sleep.wait(LIMIT).unwrap_err().to_string();
    assert!(error.contains("`sleep 100000` on host a ended"), "{error}");
    assert_eq!(testbed.host(Node::A).unwrap_err().to_string(), "host a is not running");
    testbed.restart(Node::A)?;
    assert_eq!(testbed.host(Node::A)?.check("cat /data/kept /shared/note")?, "kept\nfrom a");
    Ok(())
}
