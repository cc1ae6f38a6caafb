// Read-only memory maps of files. Python's mmap keeps a file descriptor open for each map until Python 3.13, and a
// blend of thousands of corpora would run out of them.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

constexpr const char* kOwner = "megatron.file_mapping";

struct Mapping {
  void* address;
  std::size_t size;
  ~Mapping() { ::munmap(address, size); }
};

[[noreturn]] void throw_os_error(int error, const std::string& path) {
  errno = error;
  PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
  throw py::error_already_set();
}

// The bytes of a file, which is unmapped when the last array that shares them goes.
py::array_t<std::uint8_t> map_file(const std::string& path) {
  int error = 0;
  void* address = MAP_FAILED;
  std::size_t size = 0;
  {
    py::gil_scoped_release release;  // opening a file may wait for a network
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status {};
    if (descriptor < 0 || ::fstat(descriptor, &status) != 0) {
      error = errno;
    } else if (S_ISDIR(status.st_mode)) {
      error = EISDIR;
    } else if ((size = static_cast<std::size_t>(status.st_size)) > 0) {  // nothing cannot be mapped
      address = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
      if (address == MAP_FAILED) error = errno;
    }
    if (descriptor >= 0) ::close(descriptor);
  }
  if (error != 0) throw_os_error(error, path);
  if (size == 0) return py::array_t<std::uint8_t>(0);
  py::capsule owner(new Mapping{address, size}, kOwner, [](void* mapping) { delete static_cast<Mapping*>(mapping); });
  py::array_t<std::uint8_t> bytes(static_cast<py::ssize_t>(size), static_cast<std::uint8_t*>(address), owner);
  bytes.attr("setflags")(py::arg("write") = false);
  return bytes;
}

// Pages that were read count as memory of the process until they are let go; they stay in the page cache.
void release_pages(const py::array& bytes) {
  const py::object owner = bytes.base();
  if (!owner || PyCapsule_IsValid(owner.ptr(), kOwner) == 0) {
    if (bytes.size() == 0) return;
    throw std::invalid_argument("the array is none that map_file returned");
  }
  const auto* mapping = static_cast<const Mapping*>(PyCapsule_GetPointer(owner.ptr(), kOwner));
  py::gil_scoped_release release;
  ::madvise(mapping->address, mapping->size, MADV_DONTNEED);  // a file's: read again when it is used
}

}  // namespace

PYBIND11_MODULE(file_mapping, module) {
  module.doc() = "Read-only memory maps that keep no file descriptor.";
  module.def("map_file", &map_file, py::arg("path"), "The bytes of a file, read-only. Raises OSError.");
  module.def("release_pages", &release_pages, py::arg("bytes"), "Lets the memory of a map go, which stays usable.");
}
