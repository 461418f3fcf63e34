//! The command line: what there is and its help, and nothing of what it does.

use crate::control::movement::{Map, OnTimeout, parse_bandwidth, parse_map};
use crate::units::{parse_duration, parse_size};
use crate::vmm::Load;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;
use sterna_migration::stream::{Address, AddressError};

const ABOUT: &str = "Runs virtual machines with KVM. One VM is one process; commands find it by its name.";

const ENVIRONMENT: &str = "\
Environment:
  STERNA_DIR   where sockets, locks and logs of VMs are (default /run/sterna; without root $XDG_RUNTIME_DIR/sterna)
  STERNA_LOG   off, error, warn, info, debug or trace (default warn; info for detached VMs)

Exit codes:
  0  done                                      5  timed out, the VM runs here
  1  failed, a VM that ran still runs here     6  in doubt, the VM is paused here
  2  the command line or configuration is wrong
  3  a check refused it before the guest ran   7  cannot connect, or not allowed
  4  cancelled, the VM runs here               8  the guest is lost or stopped";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "sterna", version, about = ABOUT, after_help = ENVIRONMENT, disable_help_subcommand = true)]
pub struct Cli<C: Subcommand = Command> {
    /// Results as JSON on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on standard error; twice for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: C,
}

/// `run` by itself.
#[derive(Debug, Subcommand)]
enum OnlyRun {
    Run(Box<RunArgs>),
}

impl Cli {
    /// The command line of this process. Exits where it is wrong, or asks for help.
    ///
    /// A start is to be quick, and to describe the arguments of all commands takes a thirtieth of it: `run` is parsed without the others.
    pub fn of_this_process() -> Self {
        if std::env::args_os().nth(1).is_none_or(|first| first != "run") {
            return Self::parse();
        }
        let Cli { json, verbose, command: OnlyRun::Run(args) } = Cli::<OnlyRun>::parse();
        Self { json, verbose, command: Command::Run(args) }
    }
}

/// What there is to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    #[expect(missing_docs, reason = "what is said of its arguments is its help")]
    Run(Box<RunArgs>),
    /// Guests are not touched: a table of the VMs here
    #[command(after_help = "Example:\n  sterna list --json")]
    List,
    /// The guest is not touched: what one VM is and does
    #[command(after_help = "Example:\n  sterna show web")]
    Show(Named),
    /// The guest stands still, vCPUs and devices, until it is resumed
    ///
    /// A paused guest keeps its memory and uses no CPU. Does nothing where it is paused already.
    #[command(after_help = "Example:\n  sterna pause web")]
    Pause(Named),
    /// A paused guest goes on where it was
    ///
    /// Also starts one that was run with --paused. Does nothing where it runs already.
    #[command(after_help = "Example:\n  sterna resume web")]
    Resume(Named),
    /// The guest is asked to power off: its power button is pressed
    ///
    /// Waits for it. A guest that has not reacted within the time limit runs on; the command says so and exits with 5.
    #[command(after_help = "Example:\n  sterna stop web --timeout 1m")]
    Stop(StopArgs),
    /// The guest is not touched: this terminal joins its serial port
    ///
    /// For VMs whose serial port is a socket, as it is with `run --detach`. Ctrl-] h shows the keys, Ctrl-] q leaves.
    #[command(after_help = "Example:\n  sterna console web")]
    Console(Named),
    /// Guests are not touched: what happens to one VM or to all, a JSON object a line
    ///
    /// Ends with the VM; without a name it goes on, and takes up VMs that appear.
    #[command(after_help = "Example:\n  sterna events web")]
    Events(EventsArgs),
    /// The guest gives memory to the host, or gets it back
    ///
    /// Without a size nothing is changed, and the balloon is shown.
    #[command(after_help = "Example:\n  sterna balloon web 256M")]
    Balloon(BalloonArgs),
    /// The guest is stopped and goes to a file: memory, processors and devices
    ///
    /// It goes on with `sterna restore`, here or on another host that has the same disks. Until the file is whole a failure lets
    /// the guest go on here and leaves no file. Ctrl-C cancels.
    #[command(after_help = "Example:\n  sterna save web /shared/web.sterna")]
    Save(SaveArgs),
    /// A guest goes on from a file, where it was when it was saved
    ///
    /// A file is restored once: its disks move on from then. The file must stay while the guest runs, unless --load says otherwise.
    #[command(after_help = "Example:\n  sterna restore /shared/web.sterna --map net0=tap7")]
    Restore(RestoreArgs),
    /// No guest is touched: what is in a saved file
    #[command(after_help = "Example:\n  sterna inspect /shared/web.sterna --verify")]
    Inspect(InspectArgs),
    /// Guests of other hosts come to this one
    ///
    /// Stays and takes one machine after another, each into a process of its own; ending it leaves those that run alone. What it
    /// receives is not encrypted and not authenticated: listen on a network that only your hosts can reach.
    #[command(after_help = "Example:\n  sterna receive --listen tcp:10.0.0.2:7300")]
    Receive(ReceiveArgs),
    /// A running guest moves to another host, and is gone from this one
    ///
    /// Live: its memory is copied while it runs, and it stands still for milliseconds. Quick: it stands still while its memory is
    /// copied, for as long as is foretold. Whatever fails leaves it where it was; Ctrl-C cancels. Exits with 0 when the guest
    /// runs there, 3 when a check refused it, 4 cancelled, 5 timed out, 6 in doubt, 7 when the target cannot be reached, else 1.
    #[command(after_help = "Example:\n  sterna migrate web tcp:10.0.0.2:7300 --max-downtime 20ms")]
    Migrate(Box<MigrateArgs>),
    /// A move under way is watched, changed or called off
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// No guest is touched: this host
    #[command(subcommand)]
    Host(HostCommand),
    /// The process that `receive` makes for a machine to come
    #[command(hide = true)]
    Received(ReceivedArgs),
}

/// What there is to do with the host.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// No guest is touched: what this host can do, and whether stock kernels can run on it
    ///
    /// Exits with 3 where something that every VM needs is missing.
    #[command(after_help = "Example:\n  sterna host check")]
    Check,
}

/// A VM that runs here.
#[derive(Debug, Args)]
pub struct Named {
    /// Name of the VM
    pub name: String,
}

/// A new guest boots; the command stays with it until it ends
///
/// SIGTERM or SIGINT presses the guest's power button; a second one ends it without asking. Exits with 0 when the
/// guest has powered off or was killed, with 8 when it has panicked or could not go on.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  sterna run --name web --kernel /boot/vmlinuz --initrd initrd.img \\\n    \
    --disk path=web.img --net tap=tap0,create=on --memory 1G --cpus 2")]
pub struct RunArgs {
    /// TOML file with the same names as these options (`disk` and `net` as [[disk]] and [[net]]); what is given here
    /// wins over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Return when the guest's vCPUs run; the VM stays, logs to $STERNA_DIR/NAME.log, and has its serial port at
    /// $STERNA_DIR/NAME.console
    #[arg(long)]
    pub detach: bool,
    /// Stand still before the guest's first instruction, until `sterna resume`
    #[arg(long)]
    pub paused: bool,
    /// How long after a SIGTERM the guest may take before it is said that it has not reacted
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub stop_timeout: Duration,
    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// The machine to run. Texts as given: they are judged together, with those of `--config`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// Name on this host: letters, digits, '.', '_' and '-'
    #[arg(long)]
    pub name: Option<String>,
    /// bzImage or ELF vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<String>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<String>,
    /// Kernel command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Guest RAM [default: 512M]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub memory: Option<String>,
    /// vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub cpus: Option<String>,
    /// What the vCPUs are like: host, or x86-64-v2 or x86-64-v3, which more hosts can take over [default: host]
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    /// Raw image or block device: path=P[,readonly=on][,id=ID][,direct=off][,serial=S]; `,,` stands for a comma. May
    /// be repeated
    #[arg(long, value_name = "KEYS")]
    pub disk: Vec<String>,
    /// Network on a tap device: tap=T[,mac=M][,id=ID][,create=on]. May be repeated
    #[arg(long, value_name = "KEYS")]
    pub net: Vec<String>,
    /// Socket device: cid=N,socket=PATH
    #[arg(long, value_name = "KEYS")]
    pub vsock: Option<String>,
    /// First serial port: stdio, null, file=P or socket=P [default: stdio; with --detach a socket]
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<String>,
}

/// Options of `stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Name of the VM
    pub name: String,
    /// End the guest without asking it: what it has not written to its disks is lost
    #[arg(long)]
    pub force: bool,
    /// How long to wait for the guest
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub timeout: Duration,
}

/// Options of `events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Name of the VM; all VMs where none is given
    pub name: Option<String>,
}

/// Options of `balloon`.
#[derive(Debug, Args)]
pub struct BalloonArgs {
    /// Name of the VM
    pub name: String,
    /// Memory that the guest shall give up; 0 gives all of it back
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    pub target_bytes: Option<u64>,
}

/// What there is to do with a move.
#[derive(Debug, Subcommand)]
pub enum MigrationCommand {
    /// The guest is not touched: how its move stands, or how its last one ended
    #[command(after_help = "Example:\n  sterna migration status web")]
    Status(Named),
    /// The guest is not touched: its move is followed to its end
    #[command(after_help = "Example:\n  sterna migration watch web")]
    Watch(Named),
    /// The move is called off, and the guest goes on here; too late once the target was told to start
    #[command(after_help = "Example:\n  sterna migration cancel web")]
    Cancel(Named),
    /// The guest is not touched: limits of its move are changed
    #[command(after_help = "Example:\n  sterna migration set web --max-downtime 200ms --max-bandwidth 100M/s")]
    Set(SetArgs),
    /// A guest in doubt goes on here, or ends here, on your word
    ///
    /// Look at the target first. --here: it does not run there and cannot start there any more. --there: it has started there.
    #[command(after_help = "Example:\n  sterna migration resolve web --there")]
    Resolve(ResolveArgs),
}

/// Options of `save`.
#[derive(Debug, Args)]
pub struct SaveArgs {
    /// Name of the VM
    pub name: String,
    /// The file to be made
    pub file: PathBuf,
    /// Replace the file if it is there
    #[arg(long)]
    pub overwrite: bool,
    /// Compress memory with zstd, for slow volumes; such a file is read whole when it is restored
    #[arg(long)]
    pub compress: bool,
    /// Save also with writable disks behind the host's page cache (direct=off)
    #[arg(long)]
    pub unsafe_cache: bool,
}

/// Options of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The file
    pub file: PathBuf,
    /// Another name on this host
    #[arg(long)]
    pub name: Option<String>,
    /// Other paths on this host, by device: disk0=PATH,net0=TAP,vsock=PATH,kernel=PATH,serial=null. May be repeated
    #[arg(long, value_name = "ID=PATH,...", value_parser = parse_map)]
    pub map: Vec<Map>,
    /// Stand still until `sterna resume`
    #[arg(long)]
    pub paused: bool,
    /// Restore a file that was restored before, as a second copy with its own generation id; its disks have moved on since
    #[arg(long)]
    pub again: bool,
    /// How memory comes back
    #[arg(long, value_enum, default_value_t)]
    pub load: Load,
    /// How long after a SIGTERM the guest may take before it is said that it has not reacted
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub stop_timeout: Duration,
}

/// Options of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The file
    pub file: PathBuf,
    /// Read all of its memory too, and compare it with its checksums
    #[arg(long)]
    pub verify: bool,
}

/// Options of `receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where to listen: tcp:ADDR:PORT or unix:PATH
    #[arg(long, value_name = "ADDRESS", default_value = "tcp:127.0.0.1:7300", value_parser = parse_address)]
    pub listen: Address,
    /// End after the first machine has arrived, or has not
    #[arg(long)]
    pub once: bool,
    /// Directory that disks and other files of machines may lie in; without it, all but those of the system. May be repeated
    #[arg(long, value_name = "DIR")]
    pub storage: Vec<PathBuf>,
}

/// Options of the process that `receive` makes.
#[derive(Debug, Args)]
pub struct ReceivedArgs {
    /// As for `receive`
    #[arg(long, value_name = "DIR")]
    pub storage: Vec<PathBuf>,
}

/// Options of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Name of the VM
    pub name: String,
    /// A host's receiver: tcp:HOST:PORT or unix:PATH
    #[arg(value_parser = parse_address)]
    pub target: Address,
    /// While it runs, or stopped
    #[arg(long, value_enum, default_value_t = Mode::Live)]
    pub mode: Mode,
    /// Longest standstill that is wanted of a live move
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = parse_duration)]
    pub max_downtime: Duration,
    /// Bytes a second at most; lifted while the guest stands still
    #[arg(long, value_name = "SIZE/s", value_parser = parse_bandwidth)]
    pub max_bandwidth: Option<u64>,
    /// Connections, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub connections: u16,
    /// Longest time before the guest is stopped
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    pub timeout: Duration,
    /// What happens then: the move is called off, or the guest stands still for as long as the rest takes
    #[arg(long, value_enum, default_value_t)]
    pub on_timeout: OnTimeout,
    /// Other paths on that host, by device: disk0=PATH,net0=TAP,vsock=PATH,kernel=PATH,serial=null. May be repeated
    #[arg(long, value_name = "ID=PATH,...", value_parser = parse_map)]
    pub map: Vec<Map>,
    /// Another name on that host
    #[arg(long = "as", value_name = "NAME")]
    pub rename: Option<String>,
    /// Both hosts hash all of the guest's memory while it stands still
    #[arg(long)]
    pub verify: bool,
    /// Move also with writable disks behind the host's page cache (direct=off)
    #[arg(long)]
    pub unsafe_cache: bool,
    /// Move nothing: test all that can fail later, and foretell time and standstill
    #[arg(long)]
    pub check: bool,
    /// Return when the move has begun; see `sterna migration watch`
    #[arg(long)]
    pub detach: bool,
}

/// How to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Memory is copied while the guest runs.
    Live,
    /// The guest stands still while its memory is copied.
    Quick,
}

/// Options of `migration set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// Name of the VM
    pub name: String,
    /// Longest standstill that is wanted
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub max_downtime: Option<Duration>,
    /// Bytes a second at most; 0 lifts the limit
    #[arg(long, value_name = "SIZE/s", value_parser = parse_bandwidth)]
    pub max_bandwidth: Option<u64>,
}

/// Options of `migration resolve`.
#[derive(Debug, Args)]
pub struct ResolveArgs {
    /// Name of the VM
    pub name: String,
    /// It does not run at the target, and cannot start there any more: it goes on here
    #[arg(long, required_unless_present = "there", conflicts_with = "there")]
    pub here: bool,
    /// It has started at the target: what is left of it here ends
    #[arg(long)]
    pub there: bool,
}

fn parse_address(text: &str) -> Result<Address, AddressError> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed_and_every_command_has_an_example() {
        let command = Cli::<Command>::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && !sub.has_subcommands()) {
            let example = sub.get_after_help().map(|help| help.to_string()).unwrap_or_default();
            assert!(example.contains(&format!("sterna {}", sub.get_name())), "{} has no example", sub.get_name());
        }
    }

    #[test]
    fn run_by_itself_is_what_run_is_among_the_others() {
        let help = |mut command: clap::Command| {
            command.build();
            command.find_subcommand_mut("run").unwrap().render_long_help().to_string()
        };
        assert_eq!(help(Cli::<OnlyRun>::command()), help(Cli::<Command>::command()));
    }

    #[test]
    fn a_move_in_doubt_is_resolved_one_way() {
        let parse = |line: &str| Cli::try_parse_from(format!("sterna migration resolve {line}").split_whitespace());
        for (line, expected) in [("web --here", (true, false)), ("--there web", (false, true))] {
            let Command::Migration(MigrationCommand::Resolve(args)) = parse(line).unwrap().command else {
                panic!("not resolve")
            };
            assert_eq!((args.name.as_str(), (args.here, args.there)), ("web", expected));
        }
        assert!(parse("web").is_err() && parse("web --here --there").is_err());
    }

    #[test]
    fn an_example_of_the_design_is_understood() {
        let line = "sterna run --name N --kernel K --initrd I --cmdline C --disk path=P,readonly=on --disk path=Q \
                    --net tap=T,mac=M --memory 512M --cpus 2 --vsock cid=3,socket=P --serial null --detach --paused";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Run(args) = cli.command else { panic!("not run") };
        assert_eq!(args.machine.disk, ["path=P,readonly=on", "path=Q"]);
        assert!(args.detach && args.paused && !cli.json);
        let cli = Cli::try_parse_from(["sterna", "stop", "N", "--timeout", "50ms", "--json"]).unwrap();
        let Command::Stop(args) = cli.command else { panic!("not stop") };
        assert_eq!(args.timeout, Duration::from_millis(50));
        assert!(cli.json);
    }
}
