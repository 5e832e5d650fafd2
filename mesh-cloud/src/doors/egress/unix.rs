//! A unix socket as a door: a path that leads to a living listener, or to nothing.
//!
//! A crash leaves the file behind, and a file alone does not tell whether anybody still listens. A lock beside it does:
//! it goes with its process. The new socket is bound under another name and renamed over the old one, so that whoever
//! connects meets a listener at every moment.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use runtime::shutdown::Tasks;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};

use crate::metrics::Metrics;

/// Pause after a failed accept, for lack of descriptors as a rule.
const PAUSE: Duration = Duration::from_millis(50);

/// A socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Somebody listens on it.
    #[error("another process serves {}; stop it, or give this one another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is something else than a socket.
    #[error("{} is there and is no socket; it is left as it is", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// A step failed.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// The step.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A listening unix socket. Its file goes with it, unless another process has put its own there.
#[derive(Debug)]
pub(crate) struct UnixDoor {
    listener: UnixListener,
    path: PathBuf,
    /// Device and number of the file that is ours.
    file: (u64, u64),
    _lock: File,
}

impl UnixDoor {
    /// Opens a socket with these permissions.
    pub(crate) fn open(path: &Path, mode: u32) -> Result<Self, SocketError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| SocketError::File { what, path, source }
        };
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(failed("make the folder", folder))?;
        }
        let lock_path = beside(path, ".lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(failed("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(SocketError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(e)) => return Err(failed("lock", &lock_path)(e)),
        }
        match fs::symlink_metadata(path) {
            Ok(there) if !std::os::unix::fs::FileTypeExt::is_socket(&there.file_type()) => {
                return Err(SocketError::NoSocket { path: path.to_owned() });
            }
            Ok(_) | Err(_) => {}
        }
        let draft = beside(path, ".new");
        match fs::remove_file(&draft) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &draft)(e)),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&draft).map_err(failed("listen on", &draft))?;
        fs::set_permissions(&draft, fs::Permissions::from_mode(mode)).map_err(failed("set the mode of", &draft))?;
        let file = identity(&draft).map_err(failed("look at", &draft))?;
        fs::rename(&draft, path).map_err(failed("put the socket at", path))?;
        Ok(Self { listener, path: path.to_owned(), file, _lock: lock })
    }

    /// Accepts until `accepting` stops; each visitor is handled in a task of `tasks`, at most `connections` at once.
    pub(crate) async fn run<F>(
        self,
        accepting: Tasks,
        tasks: Tasks,
        bounds: (usize, Arc<Metrics>),
        handle: impl Fn(UnixStream) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let (connections, metrics) = bounds;
        let permits = Arc::new(Semaphore::new(connections));
        let inside = metrics.door_connections.with_label_values(&[super::DOOR]);
        loop {
            let next = async {
                let permit = Arc::clone(&permits).acquire_owned().await;
                (permit, self.listener.accept().await)
            };
            let (permit, accepted) = tokio::select! {
                biased;
                () = accepting.stopping() => return,
                next = next => next,
            };
            match accepted {
                Ok((socket, _)) => {
                    let (visit, inside) = (handle(socket), inside.clone());
                    inside.inc();
                    tasks.spawn(async move {
                        visit.await;
                        inside.dec();
                        drop(permit);
                    });
                }
                Err(error) => {
                    metrics.door_refusals.with_label_values(&[super::DOOR, "accept"]).inc();
                    tracing::warn!(%error, path = %self.path.display(), "the egress door cannot accept");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

impl Drop for UnixDoor {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|there| there == self.file) {
            // Whoever finds no file is told at once; whoever finds a dead one is, too.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Who is at the other end, as far as the kernel says.
pub(crate) fn who(socket: &UnixStream) -> String {
    match socket.peer_cred() {
        Ok(cred) => format!("unix uid={} pid={}", cred.uid(), cred.pid().unwrap_or(0)),
        Err(_) => "unix".to_owned(),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}
