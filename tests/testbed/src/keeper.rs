//! Starts child processes that die with this process, whatever kills it.
//!
//! The parent-death signal comes when the *thread* that started the child ends, and test threads end early. So one thread,
//! which lives as long as the process, starts them all.

use std::{
    io,
    process::{Child, Command},
    sync::{
        OnceLock,
        mpsc::{Sender, channel},
    },
    thread,
};

type Job = (Command, Sender<io::Result<Child>>);

/// A command that is killed when its parent thread ends: `setpriv` sets the signal and becomes the program.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command
}

/// Starts `command` from the thread that never ends.
pub(crate) fn spawn(command: Command) -> io::Result<Child> {
    static JOBS: OnceLock<Sender<Job>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (sender, jobs) = channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in jobs {
                // Nobody waiting for the reply means that nobody wants the child: dropping it leaves it to the signal.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let gone = || io::Error::other("the thread that starts processes ended");
    let (reply, child) = channel();
    jobs.send((command, reply)).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}
