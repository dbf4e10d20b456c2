//! A backend that keeps what arrives, message by message, and answers each as it is told.

use crate::{common::LOCAL, messages};
use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::JoinHandle,
};

/// What it does with a request.
#[derive(Clone)]
pub enum Play {
    /// Answers when the request is complete.
    Answer(Vec<u8>),
    /// Answers at the end of the head and goes on reading.
    AtHead(Vec<u8>),
    /// Answers the complete request and ends the connection.
    Last(Vec<u8>),
    /// Answers at the end of the head and reads no more.
    LastAtHead(Vec<u8>),
    /// Says nothing before the body, and answers after it; `100 Continue` first when asked for it.
    Continue,
    /// Ends its half when the head has come.
    HalfClose,
    /// Never answers.
    Silent,
}

pub const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

pub fn ok() -> Play {
    Play::Answer(OK.to_vec())
}

#[derive(Default)]
struct Log {
    complete: Vec<Vec<u8>>,
    /// Of connections that ended within a message.
    cut: Vec<Vec<u8>>,
    /// Of messages under way.
    bytes: Vec<u8>,
}

pub struct Recorder {
    pub address: SocketAddr,
    log: Arc<Mutex<Log>>,
    play: Arc<Mutex<Play>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    pub fn start() -> Self {
        let listener = TcpListener::bind(LOCAL).expect("bind");
        let address = listener.local_addr().expect("an address");
        let (log, play) = (Arc::<Mutex<Log>>::default(), Arc::new(Mutex::new(ok())));
        let ending = Arc::new(AtomicBool::new(false));
        let (logged, played, ended) = (log.clone(), play.clone(), ending.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if ended.load(SeqCst) {
                    return;
                }
                let (log, play) = (logged.clone(), played.clone());
                // Ends with its connection, which ends with the sidecar.
                std::thread::spawn(move || serve(stream, &log, &play));
            }
        });
        Self { address, log, play, ending, thread: Some(thread) }
    }

    /// Forgets what came and plays `play` from now on.
    pub fn begin(&self, play: Play) {
        *self.log.lock().expect("the log") = Log::default();
        *self.play.lock().expect("the play") = play;
    }

    /// The requests that came whole, with their bodies as they were framed.
    pub fn seen(&self) -> Vec<String> {
        self.log.lock().expect("the log").complete.iter().map(|m| String::from_utf8_lossy(m).into_owned()).collect()
    }

    /// What came of requests that did not come whole.
    pub fn cut(&self) -> Vec<String> {
        self.log.lock().expect("the log").cut.iter().map(|m| String::from_utf8_lossy(m).into_owned()).collect()
    }

    /// All bytes, in whatever messages.
    pub fn bytes(&self) -> Vec<u8> {
        self.log.lock().expect("the log").bytes.clone()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.ending.store(true, SeqCst);
        // Wakes the accept.
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the recorder ends");
        }
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Log>, play: &Mutex<Play>) {
    let mut buffer = Vec::new();
    let mut part = [0; 16 * 1024];
    let mut greeted = false;
    loop {
        let now = play.lock().expect("the play").clone();
        if let Some(head) = messages::head_end(&buffer).filter(|_| !greeted) {
            greeted = true;
            match &now {
                Play::AtHead(answer) => drop(stream.write_all(answer)),
                Play::LastAtHead(answer) => {
                    let _ = stream.write_all(answer);
                    log.lock().expect("the log").cut.push(buffer);
                    // Without this what it did not read would make a reset of the end.
                    let _ = stream.shutdown(Shutdown::Write);
                    while stream.read(&mut part).is_ok_and(|n| n > 0) {}
                    return;
                }
                Play::Continue if messages::value(&buffer[..head], "expect").is_some() => {
                    let _ = stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
                }
                Play::HalfClose => drop(stream.shutdown(Shutdown::Write)),
                _ => {}
            }
        }
        if let Some(end) = messages::request_end(&buffer) {
            log.lock().expect("the log").complete.push(buffer.drain(..end).collect());
            greeted = false;
            match &now {
                Play::Answer(answer) => drop(stream.write_all(answer)),
                Play::Continue => drop(stream.write_all(OK)),
                Play::Last(answer) => {
                    let _ = stream.write_all(answer);
                    return;
                }
                _ => {}
            }
            continue;
        }
        match stream.read(&mut part) {
            Ok(0) | Err(_) => {
                if !buffer.is_empty() {
                    log.lock().expect("the log").cut.push(buffer);
                }
                return;
            }
            Ok(n) => {
                buffer.extend_from_slice(&part[..n]);
                log.lock().expect("the log").bytes.extend_from_slice(&part[..n]);
            }
        }
    }
}
