//! The command line: what there is and its help, and nothing of what it does.

use crate::units::{parse_duration, parse_size};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

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
pub struct Cli {
    /// Results as JSON on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on standard error; twice for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What there is to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// A new guest boots; the command stays with it until it ends
    ///
    /// SIGTERM or SIGINT presses the guest's power button; a second one ends it without asking. Exits with 0 when the
    /// guest has powered off or was killed, with 8 when it has panicked or could not go on.
    #[command(after_help = "Example:\n  sterna run --name web --kernel /boot/vmlinuz --initrd initrd.img \\\n    \
        --disk path=web.img --net tap=tap0,create=on --memory 1G --cpus 2")]
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
    /// No guest is touched: this host
    #[command(subcommand)]
    Host(HostCommand),
    /// The VM that `run --detach` leaves behind; its orders come on standard input
    #[command(hide = true)]
    Detached(Named),
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

/// Options of `run`.
#[derive(Debug, Args)]
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed_and_every_command_has_an_example() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && !sub.has_subcommands()) {
            let example = sub.get_after_help().map(|help| help.to_string()).unwrap_or_default();
            assert!(example.contains(&format!("sterna {}", sub.get_name())), "{} has no example", sub.get_name());
        }
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
