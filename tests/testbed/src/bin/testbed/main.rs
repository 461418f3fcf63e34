//! The testbed for a person: start it, get a prompt in its hosts, run a command in one, see the demo.

mod demo;
mod first;

use clap::{Parser, Subcommand, ValueEnum};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};
use sterna_testbed::{
    Error, Files, HostOptions, Node, Options, Result, Testbed, attach, console,
    terminal::{Left, join},
};

#[derive(Parser)]
#[command(about = "Two Sterna hosts and shared storage on this machine", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start two hosts and give a prompt in the first; leaving ends them
    Up {
        /// RAM of each host, MiB
        #[arg(long, default_value_t = 2048)]
        memory: u32,
        /// vCPUs of each host; one on the software CPU
        #[arg(long, default_value_t = 2)]
        cpus: u32,
    },
    /// Boot a stock kernel under Sterna on a host of the testbed, and move it to another: live, quick, live
    Demo,
    /// Boot one stock guest on this machine's own KVM, which has to run stock kernels: `sterna host check` tells
    First {
        /// Where its disk is made
        #[arg(default_value = ".")]
        dir: PathBuf,
    },
    /// A prompt in a host that `testbed up` runs elsewhere
    Shell {
        /// a, b or n
        host: HostName,
    },
    /// Run a shell command in a host that `testbed up` runs elsewhere
    Run {
        /// a, b or n
        host: HostName,
        /// The command
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum HostName {
    A,
    B,
    N,
}

impl From<HostName> for Node {
    fn from(name: HostName) -> Self {
        match name {
            HostName::A => Self::A,
            HostName::B => Self::B,
            HostName::N => Self::N,
        }
    }
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Up { memory, cpus } => up(HostOptions { memory_mib: memory, cpus }),
        Command::Demo => demo::demo(),
        Command::First { dir } => first(&dir),
        Command::Shell { host } => shell(host.into()),
        Command::Run { host, command } => run(host.into(), &command.join(" ")),
    };
    done.unwrap_or_else(|error| {
        eprintln!("testbed: {}", chain(&error));
        ExitCode::FAILURE
    })
}

/// The error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {}", chain(source)))
}

fn first(dir: &Path) -> Result<ExitCode> {
    let ground = first::Ground::choose(dir, None)?;
    let seen = ground.boot()?;
    println!("\n{}", ground.sum_up(&seen));
    Ok(ExitCode::SUCCESS)
}

/// What stands behind the last word that starts so.
fn word(text: &str, name: &str) -> String {
    text.split_whitespace().filter_map(|word| word.strip_prefix(name)).next_back().unwrap_or("?").to_owned()
}

/// The guest is not as it should be.
fn wrong(output: String) -> Error {
    Error::Failed { who: "the guest".into(), command: "check".into(), status: 1, output }
}

fn up(size: HostOptions) -> Result<ExitCode> {
    eprintln!("starting hosts a and b, and n with the shared volume");
    let start = Instant::now();
    let testbed = Testbed::start(&Options { a: size, b: Some(size), ..Options::default() })?;
    eprintln!(
        "up after {:.1} s ({}), logs in {}",
        start.elapsed().as_secs_f32(),
        testbed.accel().name(),
        testbed.dir().display()
    );
    eprintln!(
        "a is 10.9.0.1, b is 10.9.0.2 on bridge br0; /shared is shared, /dev/vdb a raw disk that both see, /data each"
    );
    eprintln!(
        "has a kernel and an initramfs for guests. Ctrl-] then a, b or n: that host's console; Ctrl-] q: end all"
    );
    visit(testbed.dir(), Node::A)
}

fn shell(node: Node) -> Result<ExitCode> {
    let (dir, _) = attach(&Files::new().testbed())?;
    eprintln!("Ctrl-] q leaves");
    visit(&dir, node)
}

/// A console after another until the person has enough.
fn visit(dir: &Path, mut node: Node) -> Result<ExitCode> {
    loop {
        let mut stream = console(dir, node)?;
        eprintln!("--- host {} ---\r", node.name());
        match join(&mut stream)? {
            Left::Key(key) => match Node::from_name(&char::from(key).to_string()) {
                Some(next) => node = next,
                None if key == b'q' => break,
                None => eprintln!("\r\nCtrl-] a, b, n or q\r"),
            },
            Left::InputEnded => break,
            Left::HostGone => {
                eprintln!("host {} is gone", node.name());
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    eprintln!();
    Ok(ExitCode::SUCCESS)
}

fn run(node: Node, command: &str) -> Result<ExitCode> {
    let (_, hosts) = attach(&Files::new().testbed())?;
    let host = hosts.into_iter().find(|(name, _)| *name == node).ok_or_else(|| Error::Down(node.name().into()))?.1;
    let output = host.run_for(command, std::time::Duration::from_secs(3600))?;
    print!("{}", output.stdout);
    eprint!("{}", output.stderr);
    Ok(u8::try_from(output.status).map_or(ExitCode::FAILURE, ExitCode::from))
}
