# Every field that the real GenerateExtensionDescription needs; written so that a test can read what CMake saw.
set(_lines)
foreach(field HOMEPAGE CONTRIBUTORS DESCRIPTION ICONURL SCREENSHOTURLS DEPENDS)
  if(NOT EXTENSION_${field})
    message(FATAL_ERROR "EXTENSION_${field} is empty")
  endif()
  string(APPEND _lines "${field}=${EXTENSION_${field}}\n")
endforeach()
file(WRITE ${CMAKE_BINARY_DIR}/extension.txt "PROJECT=${PROJECT_NAME}\n${_lines}")
