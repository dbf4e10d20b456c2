//! What can go wrong between this process and the kernel's BPF objects.

use crate::upgrade::Shape;
use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0} is not a BPF file system; mount one: `mount -t bpf bpf {0}`")]
    NotBpffs(PathBuf),
    #[error("pinned object {path} is not there; the agent makes it when it starts")]
    NotPinned { path: PathBuf },
    #[error(
        "pinned object {path} is not there: the node's data path has layout {found}, this program is of a release with \
         layout {layout}; install agent and plugin of one release and start the agent"
    )]
    OtherLayout { path: PathBuf, layout: u32, found: u32 },
    #[error(
        "take over map {map} in {folder}: it is {had}, this release has {wanted} and no conversion, and what the map holds \
         cannot be had otherwise; start the release that made it, or drain the node and remove the folder"
    )]
    Shape { map: String, folder: PathBuf, had: Shape, wanted: Shape },
    #[error("{operation} {object}")]
    Syscall {
        operation: &'static str,
        object: String,
        #[source]
        cause: io::Error,
    },
    #[error(
        "pinned map {path} has keys of {key} and values of {value} bytes, this program expects {want_key} and \
         {want_value}; drain the node and remove the folder, the agent makes a new one"
    )]
    Layout { path: PathBuf, key: u32, value: u32, want_key: u32, want_value: u32 },
    #[error("read the eBPF object")]
    Parse(#[source] aya_obj::ParseError),
    #[error("load the eBPF object")]
    Object(#[source] Box<aya::EbpfError>),
    #[error("load eBPF program {name}")]
    Program {
        name: &'static str,
        #[source]
        cause: Box<aya::programs::ProgramError>,
    },
    #[error("map the ring buffer {path}")]
    RingBuffer {
        path: PathBuf,
        #[source]
        cause: Box<aya::maps::MapError>,
    },
    #[error("the eBPF object holds no program {0}; it was built from other sources")]
    NoProgram(&'static str),
}

impl Error {
    pub(crate) fn syscall(operation: &'static str, object: impl ToString, cause: io::Error) -> Self {
        Self::Syscall { operation, object: object.to_string(), cause }
    }

    /// The kernel's error number, where one was the cause.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Syscall { cause, .. } => cause.raw_os_error(),
            _ => None,
        }
    }

    /// A map has no room, or the kernel no memory for it.
    pub fn is_full(&self) -> bool {
        matches!(self.errno(), Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM))
    }

    /// In one line.
    pub(crate) fn with_cause(&self) -> String {
        std::error::Error::source(self).map_or_else(|| self.to_string(), |cause| format!("{self}: {cause}"))
    }
}

pub(crate) type Result<T> = std::result::Result<T, Error>;
