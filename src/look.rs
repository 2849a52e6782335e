//! A page that shows what a student's adapter does at each token of a chat, and changes it there: `undertone look`. A
//! server on this machine's loopback address gives the page and answers its questions; one thread has the models.

pub mod desk;
pub(crate) mod first_words;
pub mod guard;
pub mod models;
pub mod server;
pub mod setting;

pub use server::{Address, serve};
